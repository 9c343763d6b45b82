"""A folder for a board: it builds as it is, on each processor at hand, and its one image gives NumPy's logits."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from integer_nets import images, noise_set, quantized

from hq_lib.deploy.c import ExportError, export_folder
from hq_lib.deploy.c.board import CODE_BYTES, STACK_BYTES
from hq_lib.deploy.c.runtime import RUNTIME, SOURCES
from hq_lib.integer import ImageError, RecordError, lower, run
from hq_lib.integer.record import Requantizer

if not shutil.which("make"):
    pytest.skip("needs make", allow_module_level=True)

BOARDS = {
    "x86-64, gcc": ("gcc", ""),
    "x86-64, clang": ("clang", ""),
    "arm without floating-point unit": ("arm-linux-gnueabi-gcc", "qemu-arm"),
    "aarch64": ("aarch64-linux-gnu-gcc", "qemu-aarch64"),
    "riscv64": ("riscv64-linux-gnu-gcc", "qemu-riscv64"),
    "big-endian powerpc": ("powerpc-linux-gnu-gcc", "qemu-ppc"),
}


def made(folder: Path, board: str, *words: str) -> subprocess.CompletedProcess[str]:
    """What ``make run`` says for one of ``BOARDS``."""
    cc, emulator = BOARDS[board]
    for tool in filter(None, (cc, emulator)):
        if not shutil.which(tool):
            pytest.skip(f"needs {tool}")
    call = ["make", "-s", "-C", folder, "run", f"CC={cc}", f"RUN={emulator}", *words]
    return subprocess.run(list(map(str, call)), capture_output=True, text=True, timeout=120, check=False)


def exported(
    folder: Path, requantizer: Requantizer = "fixed", policy: str = "w4a4", net: str = "residual"
) -> tuple[Path, int]:
    """(folder, class) of a small network and an image of pixels."""
    noise = noise_set(torch.Generator().manual_seed(3), 1, "test")
    imodel = lower(quantized(net, policy), requantizer=requantizer, images=noise.spec)
    pixels = noise.images[0].numpy()
    mean, std = (np.reshape(v, (-1, 1, 1)).astype(np.float32) for v in (noise.spec.mean, noise.spec.std))
    return export_folder(imodel, folder, pixels), int(
        run(imodel, ((pixels / np.float32(255) - mean) / std)[None]).argmax()
    )


@pytest.mark.parametrize("requantizer", ["float32", "fixed"])
@pytest.mark.parametrize("board", [name for name in BOARDS if "big" not in name])
def test_the_folder_builds_and_its_image_gives_the_network_s_logits(board, requantizer, tmp_path):
    folder, label = exported(tmp_path / "fire ware", requantizer)
    static = () if board.startswith("x86") else ("LDFLAGS=-static",)
    done = made(folder, board, "CFLAGS=-O1 -DHQM_PORTABLE", *static)
    assert (done.returncode, done.stdout) == (0, f"class {label}\n"), done


def test_a_big_endian_processor_is_refused(tmp_path):
    done = made(exported(tmp_path)[0], "big-endian powerpc", "CFLAGS=-O1", "LDFLAGS=-static")
    assert done.returncode != 0
    assert done.stdout == "big-endian processors are not supported\n"


def test_other_logits_are_noticed(tmp_path):
    folder, label = exported(tmp_path)
    source = (folder / "net.c").read_text()
    head, tail = source.split("net_logits[5] = {\n    0x")
    (folder / "net.c").write_text(f"{head}net_logits[5] = {{\n    0x{'7' if tail[0] != '7' else '6'}{tail[1:]}")
    done = made(folder, "x86-64, gcc", "CFLAGS=-O0")
    assert done.returncode != 0
    assert done.stdout.startswith(f"class {label}\n")
    assert "not those" in done.stdout


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_float_images_and_what_the_readme_says(compiler, tmp_path):
    imodel, x = lower(quantized("mobile", "w8a8")), images(1).numpy()
    folder = export_folder(imodel, tmp_path, x[0], name="tiny_net")
    done = made(folder, f"x86-64, {compiler}", "CFLAGS=-O1")  # with the vector kernels of this processor
    assert (done.returncode, done.stdout) == (0, f"class {run(imodel, x).argmax()}\n"), done
    told = (folder / "README.md").read_text()
    header = (folder / "tiny_net.h").read_text()
    n_words, arena = (int(header.split(mark)[1].split(end)[0]) for mark, end in (("_model[", "]"), ("_SIZE ", "u")))
    assert f"{4 * n_words:,}" in told
    assert f"{arena:,}" in told
    assert "-ffp-contract=off" in told
    assert 'requantizer="fixed"' in told
    assert "size tiny_net" in told


SPENT = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include "hqm.h"
#include "net.h"
static uint32_t arena[NET_ARENA_SIZE / 4];
static float logits[NET_N_LOGITS];
static unsigned char room[1 << 18];
static void *nothing(void *p) { return p; }
static void *work(void *p) {
    hqm_model model;
    if (hqm_open(&model, net_model, sizeof net_model) != HQM_OK) return p;
    return hqm_run_pixels(&model, arena, net_image, logits) == HQM_OK ? arena : p;
}
static long spent(void *(*todo)(void *), void *want) { /* a thread on a stack of known bytes: how many are others now */
    pthread_t thread; pthread_attr_t attributes; void *found; size_t i = 0;
    memset(room, 0xa5, sizeof room);
    pthread_attr_init(&attributes), pthread_attr_setstack(&attributes, room, sizeof room);
    if (pthread_create(&thread, &attributes, todo, NULL) || pthread_join(thread, &found) || found != want) return -1;
    while (room[i] == 0xa5) i++;
    return (long)(sizeof room - i);
}
int main(void) { printf("%ld\n", spent(work, arena) - spent(nothing, NULL)); return 0; }
"""


@pytest.mark.parametrize(("board", "optimize"), [("x86-64, gcc", "-O3"), ("arm without floating-point unit", "-Os")])
def test_stack_and_code_take_no_more_than_the_readme_says(board, optimize, tmp_path):
    for net, requantizer in (("residual", "float32"), ("gated", "fixed"), ("mobile", "fixed")):
        folder, _ = exported(tmp_path / net, requantizer, net=net)
        (folder / "main.c").write_text(SPENT)
        thumb = "-march=armv7-a -mthumb" if board.startswith("arm") else ""
        done = made(folder, board, f"CFLAGS={optimize} -DHQM_PORTABLE {thumb} -std=gnu99 -pthread", "LDFLAGS=-static")
        assert done.returncode == 0, done
        assert 500 < int(done.stdout) < STACK_BYTES
    if thumb:
        objects = f"cd {folder} && arm-linux-gnueabi-gcc -std=c99 -Os -DHQM_PORTABLE {thumb} -c hqm_*.c"
        subprocess.run(f"{objects} && arm-linux-gnueabi-size -t *.o > sizes", shell=True, check=True)
        assert CODE_BYTES / 2 < int((folder / "sizes").read_text().splitlines()[-1].split()[0]) < CODE_BYTES


def test_the_runtime_can_be_called_from_cplusplus(tmp_path):
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    folder, _ = exported(tmp_path)
    (folder / "main.c").unlink()
    (folder / "app.cpp").write_text(
        '#include "hqm.h"\n#include "net.h"\n'
        "int main() { hqm_model m; return hqm_open(&m, net_model, sizeof net_model) == HQM_OK ? 0 : 1; }\n"
    )
    script = "gcc -std=c99 -O0 -DHQM_PORTABLE -c *.c && g++ -Wall -Wextra -Werror app.cpp *.o -o app && ./app"
    done = subprocess.run(script, shell=True, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [("CFLAGS=-O3 -march=native",), ("CFLAGS=-O3 -march=native", "SANITIZE=1"), ()])
def test_a_caller_s_flags_leave_those_of_the_arithmetic(words, tmp_path):
    call = ["make", "-n", "-C", str(SOURCES), "CC=cc", f"BUILD={tmp_path}", *words]
    told = subprocess.run(call, capture_output=True, text=True, check=True).stdout.splitlines()
    built = [line for line in told if line.startswith("cc")]
    assert len(built) > len(RUNTIME)
    for flag in ("-ffp-contract=off", "-std=c99", "-DHQM_THREADS", *(word.split("=", 1)[1] for word in words[:1])):
        assert all(flag in line for line in built), flag


def test_no_heap_no_files_and_what_cannot_be_exported(tmp_path):
    for word in ("malloc", "calloc", "fopen", "printf"):
        assert not any(word in (SOURCES / name).read_text() for name in RUNTIME)
    imodel = lower(quantized("residual", "w8a8"))
    with pytest.raises(ExportError, match="lower-case"):
        export_folder(imodel, tmp_path, images(1)[0], name="no identifier")
    with pytest.raises(ImageError, match=r"\(3, 12, 12\)"):
        export_folder(imodel, tmp_path, images(2))
    with pytest.raises(RecordError, match="mean"):
        export_folder(imodel, tmp_path, np.zeros((3, 12, 12), np.uint8))
    assert not list(tmp_path.iterdir())

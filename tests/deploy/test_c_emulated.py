"""The C runtime on processors that are not here: NumPy's bits from NEON in an emulator, and from AVX-512 in plain C.

A machine with such a processor runs its kernels in ``test_c.py`` itself, for every policy and requantizer.
"""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from integer_nets import NETS, all_pairs, images, quantized, random_layer
from single_layers import convolution, drawn

from hq_lib.deploy.c import program, to_bytes
from hq_lib.deploy.c.runtime import RUNTIME, SOURCES, TOOL, CompilerError
from hq_lib.integer import lower, run
from hq_lib.integer.record import REQUANTIZERS, IntegerModel

MISSING = """
#include <string.h>
#include <math.h>
#include <simde/x86/avx512.h>
#define LANEWISE(NAME, FROM, S, n, TO, T, m, VALUE)                                                                   \
    static __attribute__((unused)) TO NAME(FROM x) {                                                                  \
        S a[n]; T b[m]; TO y;                                                                                         \
        memset(b, 0, sizeof b); memcpy(a, &x, sizeof a);                                                              \
        for (int i = 0; i < (n < m ? n : m); i++) b[i] = VALUE;                                                       \
        memcpy(&y, b, sizeof y); return y;                                                                            \
    }
LANEWISE(_mm512_cvtepi32_ps, __m512i, int, 16, __m512, float, 16, (float)a[i])
LANEWISE(_mm512_cvtps_epi32, __m512, float, 16, __m512i, int, 16, (int)lrintf(a[i]))
LANEWISE(_mm512_cvtepu8_epi32, __m128i, unsigned char, 16, __m512i, int, 16, a[i])
LANEWISE(_mm512_cvtepi8_epi32, __m128i, signed char, 16, __m512i, int, 16, a[i])
LANEWISE(_mm512_cvtepi16_epi32, __m256i, short, 16, __m512i, int, 16, a[i])
LANEWISE(_mm512_cvtepi32_epi8, __m512i, int, 16, __m128i, unsigned char, 16, (unsigned char)a[i])
static __attribute__((unused)) __m512i _mm512_srav_epi32(__m512i x, __m512i by) {
    int a[16], n[16];
    memcpy(a, &x, sizeof a); memcpy(n, &by, sizeof n);
    for (int i = 0; i < 16; i++) a[i] = a[i] >= 0 ? a[i] >> n[i] : ~(~a[i] >> n[i]);
    memcpy(&x, a, sizeof x); return x;
}
typedef unsigned short __mmask16;
static __attribute__((unused)) __m512i _mm512_mask_shuffle_epi32(__m512i to, __mmask16 mask, __m512i x, int order) {
    int a[16], b[16];
    memcpy(a, &x, sizeof a); memcpy(b, &to, sizeof b);
    for (int i = 0; i < 16; i++) if (mask >> i & 1) b[i] = a[i / 4 * 4 + (order >> i % 4 * 2 & 3)];
    memcpy(&to, b, sizeof to); return to;
}
typedef unsigned long long __mmask64;
static __attribute__((unused)) __m512i _mm512_maskz_loadu_epi32(__mmask16 mask, const void *from) {
    int a[16]; __m512i x;
    for (int i = 0; i < 16; i++) { a[i] = 0; if (mask >> i & 1) memcpy(a + i, (const int *)from + i, 4); }
    memcpy(&x, a, sizeof x); return x;
}
static __attribute__((unused)) void store_some(char *to, unsigned long long mask, const char *from, int n) {
    for (int i = 0; i < n; i++) if (mask >> i & 1) to[i] = from[i];
}
#define _mm512_mask_storeu_epi8(to, mask, x) { __m512i v_ = x; store_some((void *)(to), mask, (void *)&v_, 64); }
#define _mm_mask_storeu_epi8(to, mask, x) { __m128i v_ = x; store_some((void *)(to), mask, (void *)&v_, 16); }
#undef _mm512_fmadd_ps
static __attribute__((unused)) __m512 _mm512_fmadd_ps(__m512 x, __m512 y, __m512 z) {
    float a[16], b[16], c[16];
    memcpy(a, &x, sizeof a); memcpy(b, &y, sizeof b); memcpy(c, &z, sizeof c);
    for (int i = 0; i < 16; i++) c[i] = fmaf(a[i], b[i], c[i]);
    memcpy(&z, c, sizeof z); return z;
}
"""
"""what the header of emulated instructions lacks, or (a fused multiplication and addition) rounds twice"""


def neon(folder: Path) -> list[str]:
    """Emulator and command-line program for 64-bit ARM, linked statically, with the flags of every other build."""
    cc, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    emulator = emulator or shutil.which("qemu-aarch64-static")
    if not cc or not emulator:
        pytest.skip("needs aarch64-linux-gnu-gcc and qemu-aarch64 (qemu-user)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CFLAGS", "-static")
        patch.setenv("CC", cc)
        try:
            return [emulator, str(program())]
        except CompilerError:
            pytest.skip(f"{cc} has no static C library (Debian: libc6-dev-arm64-cross)")


def avx512(folder: Path) -> list[str]:
    """The program with every vector instruction replaced by plain C (SIMD Everywhere)."""
    if not Path("/usr/include/simde/x86/avx512.h").exists() or not shutil.which("gcc"):
        pytest.skip("needs gcc and SIMD Everywhere (Debian: libsimde-dev)")
    (folder / "missing.h").write_text(MISSING)
    macros = ("HQM_EMULATED", "SIMDE_ENABLE_NATIVE_ALIASES", "_IMMINTRIN_H_INCLUDED", "__builtin_cpu_supports(x)=1")
    macros += ("_POSIX_C_SOURCE=199309L",)
    words = ["gcc", "-std=c99", "-O1", "-w", "-ffp-contract=off", *(f"-D{m}" for m in macros), "-include"]
    words += [folder / "missing.h", *(SOURCES / name for name in RUNTIME + TOOL), "-lm", "-o", folder / "hqm"]
    built = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return [str(folder / "hqm")]


@pytest.fixture(scope="module", params=[("neon", neon), ("avx512vnni", avx512)], ids=["neon", "avx512vnni"])
def machine(request, tmp_path_factory) -> tuple[list[str], str]:
    """(how the program is called, name of its kernels)."""
    kernel, build = request.param
    return build(tmp_path_factory.mktemp(kernel)), kernel


def call(hqm: list[str], folder: Path, *words: str) -> dict[str, str]:
    """What the program says of the container and images in ``folder``; logits lie there afterwards."""
    files = ["net.hqm", "--raw-f32", "x.f32", "--logits", "logits.f32"]
    done = subprocess.run([*hqm, *files, *words], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


def n_wrong(hqm: list[str], folder: Path, imodel: IntegerModel, x: np.ndarray, kernel: str) -> int:
    """Logits of ``kernel`` that differ from NumPy's."""
    (folder / "net.hqm").write_bytes(to_bytes(imodel))
    (folder / "x.f32").write_bytes(x.tobytes())
    assert call(hqm, folder, "--kernel", kernel)["kernel"] == kernel
    want = run(imodel, x)
    found = np.fromfile(folder / "logits.f32", np.float32)
    return int((found.view(np.int32) != want.ravel().view(np.int32)).sum())


@pytest.mark.parametrize("policy", ["w8a8", "w4a4"])
@pytest.mark.parametrize("net", NETS)
def test_networks(net, policy, machine, tmp_path):
    hqm, kernel = machine
    qnet, x = quantized(net, policy), images(12, seed=5).numpy()
    for requantizer in ("float32", "fixed"):
        imodel = lower(qnet, requantizer=requantizer)
        for name in ("scalar", kernel):
            assert n_wrong(hqm, tmp_path, imodel, x, name) == 0, (requantizer, name)


@pytest.mark.parametrize("w_dtype", ["int8", "int16"])
@pytest.mark.parametrize("residual", [None, "uint8", "int32"])
@pytest.mark.parametrize("requantizer", ["float32", "fixed"])
def test_layers_of_awkward_sizes(requantizer, residual, w_dtype, machine, tmp_path):
    for seed in range(10):
        imodel, x = random_layer(
            seed, conv=seed != 1, x_dtype="uint8", w_dtype=w_dtype, residual=residual, requantizer=requantizer
        )
        assert n_wrong(machine[0], tmp_path, imodel, x, machine[1]) == 0, seed


@pytest.mark.parametrize("requantizer", REQUANTIZERS)
@pytest.mark.parametrize("odd", [True, False])
def test_bytes_out_of_registers(odd, requantizer, machine, tmp_path):
    """Dense and depthwise layers of every storage of weights; those of 2 q + 1 want runs of a multiple of 4."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        groups, c_out, kernel = (1, 40, (1, 1)) if seed % 2 else (20, 20, (3, 3))
        most = (7, 127)[seed // 2 % 2]
        imodel, x, _ = drawn(rng, groups, 20, c_out, kernel, (1, 1), (1, 1), (4, 5),
                             most=most, odd=odd, requantizer=requantizer)  # fmt: skip
        assert n_wrong(machine[0], tmp_path, imodel, x, machine[1]) == 0, seed


@pytest.mark.parametrize("channels", [32, 68, 192])
def test_four_bits_in_tiles(channels, machine, tmp_path):
    rng = np.random.default_rng(channels)
    x, weight = rng.integers(0, 16, (channels, 9, 10)), 16 * rng.integers(-8, 8, (20, channels, 3, 3))
    imodel, image = convolution(x, weight.astype(np.int8), 7, (1, 1, 1, 1), np.zeros(20, np.int32), a_bits=4)
    assert n_wrong(machine[0], tmp_path, imodel, image, machine[1]) == 0


@pytest.mark.parametrize("add", [True, False])
def test_ties_are_rounded_alike(add, machine, tmp_path):
    for seed in range(4 if add else 2):
        for requantizer in ("float32", "fixed"):
            imodel, x = all_pairs(seed, requantizer=requantizer, add=add)
            assert n_wrong(machine[0], tmp_path, imodel, x, machine[1]) == 0, (seed, requantizer)


def test_neon_is_what_arm_gets_unasked_and_x86_kernels_are_not_there(tmp_path):
    hqm = neon(tmp_path)
    (tmp_path / "net.hqm").write_bytes(to_bytes(lower(quantized("residual", "w8a8"))))
    (tmp_path / "x.f32").write_bytes(images(1).numpy().tobytes())
    assert call(hqm, tmp_path)["kernel"] == "neon"
    done = subprocess.run([*hqm, "net.hqm", "--raw-f32", "x.f32", "--kernel", "avx2"], cwd=tmp_path, check=False)
    assert done.returncode == 2

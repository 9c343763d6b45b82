"""Rendered notebooks to send to a collaborator: one folder of self-contained HTML pages with an index.

python -m hq_lib.results.share --profile quick
"""

import argparse
import html
import json
from pathlib import Path

from hq_lib.results import paths

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Quantization workbook</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:3rem auto;padding:0 1rem}}
li{{margin:.6rem 0}}small{{color:#555}}</style></head><body><h1>Quantization workbook</h1>
<p>Executed notebooks, profile <b>{profile}</b>. Every page is self-contained.</p><ul>{items}</ul></body></html>
"""


def render(profile: str) -> Path:
    """Renders every executed notebook of a profile; returns the folder, which holds ``index.html``.

    Raises ``FileNotFoundError`` where no notebook has been executed in that profile yet.
    """
    from nbconvert import HTMLExporter  # slow to import, and only needed here

    build = paths.build_dir(profile)
    executed = sorted((build / "notebooks").glob("*.ipynb"))
    if not executed:
        raise FileNotFoundError(f"no executed notebooks in {build / 'notebooks'}: run `make paper PROFILE={profile}`")
    folder = build / "share"
    folder.mkdir(parents=True, exist_ok=True)
    exporter = HTMLExporter(embed_images=True)
    items = []
    for notebook in executed:
        print(f"rendering {notebook.stem}", flush=True)
        page, _ = exporter.from_filename(str(notebook))
        (folder / f"{notebook.stem}.html").write_text(page, encoding="utf-8")
        items.append(_item(notebook))
    (folder / "index.html").write_text(PAGE.format(profile=profile, items="".join(items)), encoding="utf-8")
    return folder


def _item(notebook: Path) -> str:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    first = next((c for c in content["cells"] if c["cell_type"] == "markdown"), {"source": [notebook.stem]})
    lines = "".join(first["source"]).splitlines()
    title = lines[0].lstrip("# ").strip()
    question = next((ln.removeprefix("**Question.**").strip() for ln in lines if ln.startswith("**Question.**")), "")
    failed = " (stopped with an error)" if content["metadata"].get("papermill", {}).get("exception") else ""
    link = f'<a href="{notebook.stem}.html">{html.escape(title)}</a>{failed}'
    return f"<li>{link}<br><small>{html.escape(question)}</small></li>"


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m hq_lib.results.share", description=render.__doc__)
    parser.add_argument("--profile", default="quick", choices=paths.PROFILES)
    folder = render(parser.parse_args(arguments).profile)
    print(f"pages in {folder}: open index.html")


if __name__ == "__main__":
    main()

"""Judge masks of sftstream and of TRL by the oracle of the tests, on the same conversations.

`python benchmarks/masks/peers.py TEMPLATES... --trl PYTHON` prints a table: a row for each system,
with the number of conversations whose mask is right, wrong or refused. PYTHON is the interpreter of
an environment with TRL. TEMPLATES are files or directories.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import judge  # noqa: E402 (found by the path above)


def trl_verdicts(python: str, path: Path, directory: Path) -> Iterator[str]:
    """Yield the verdict on TRL's mask of each shape."""
    template = path.read_text(encoding="utf-8")
    try:
        encoder = judge.open_encoder(template)
    except ValueError:
        return
    encoder.tokenizer.hf.save_pretrained(str(directory / path.stem))
    cases = [judge.conversation(shape) for shape in judge.SHAPES]
    lines = [
        json.dumps(
            {"tokenizer": str(directory / path.stem), "template": template, "messages": messages, "tools": tools}
        )
        for messages, tools in cases
    ]
    command = [python, str(Path(__file__).with_name("trl_masks.py"))]
    printed = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=True).stdout
    for (messages, tools), line in zip(cases, printed.splitlines(), strict=True):
        yield trl_verdict(judge.Oracle(encoder, template, messages, tools), json.loads(line))


def trl_verdict(oracle: judge.Oracle, result: dict[str, Any]) -> str:
    if oracle.text is None:
        return "raises"
    if "refused" in result:
        return "lossless" if oracle.lossless() else "refused"
    right = "right" if result["text"] == oracle.text else "another text"
    oracle.text = result["text"]
    return "wrong" if oracle.fault(result["text"], [(start, end) for start, end in result["spans"]]) else right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--trl", required=True, help="Python interpreter with TRL")
    arguments = parser.parse_args()
    paths = [p for path in arguments.paths for p in (sorted(path.glob("*.jinja")) if path.is_dir() else [path])]
    counts = {"sftstream": Counter(case.verdict for path in paths for case in judge.judge(path))}
    with tempfile.TemporaryDirectory() as directory:
        counts["TRL"] = Counter(v for path in paths for v in trl_verdicts(arguments.trl, path, Path(directory)))
    columns = ("right", "wrong", "another text", "lossless", "refused", "raises")
    print("| system | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for system, verdicts in counts.items():
        print(f"| {system} | " + " | ".join(str(verdicts[column]) for column in columns) + " |")


if __name__ == "__main__":
    main()

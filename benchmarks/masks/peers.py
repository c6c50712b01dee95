"""Judge masks of sftstream, TRL, axolotl and NeMo Automodel by the oracle of the tests.

`python benchmarks/masks/peers.py TEMPLATES... --peer trl=PYTHON --peer axolotl=PYTHON` prints a
table: a row for each system, with the number of conversations whose mask is right, wrong or
refused. PYTHON is the interpreter of an environment with the peer. TEMPLATES are files or
directories. `--wrong FILE` writes each wrong mask of a peer to a file.
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

from sftstream import ChatEncoder  # noqa: E402


def encoders(paths: list[Path]) -> Iterator[tuple[Path, ChatEncoder]]:
    """Yield each template with an encoder, unless sftstream refuses the template."""
    for path in paths:
        try:
            yield path, judge.open_encoder(path.read_text(encoding="utf-8"))
        except ValueError as error:
            print(f"{path.name}: {error}", file=sys.stderr)


def cases(path: Path, encoder: ChatEncoder, directory: Path) -> Iterator[tuple[judge.Oracle, dict[str, Any]]]:
    """Yield the oracle and the input line of each shape."""
    template, saved = path.read_text(encoding="utf-8"), str(directory / path.stem)
    encoder.tokenizer.hf.save_pretrained(saved)
    special = dict.fromkeys(judge.SPECIAL.findall(template))
    stops = [token for token in special if judge.STOPS.search(token)]
    for messages, tools in map(judge.conversation, judge.SHAPES):
        line = {"tokenizer": saved, "template": template, "stops": stops, "messages": messages, "tools": tools}
        yield judge.Oracle(encoder, template, messages, tools), line


def answers(peer: str, python: str, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what a peer answers to the input lines."""
    command = [python, str(Path(__file__).with_name("peer_masks.py")), peer]
    given = "\n".join(map(json.dumps, lines))
    ended = subprocess.run(command, input=given, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in ended.stdout.splitlines()]


def verdict(oracle: judge.Oracle, answer: dict[str, Any]) -> tuple[str, str]:
    if oracle.text is None:
        return "raises", ""
    if "refused" in answer:
        return ("lossless" if oracle.lossless() else "refused"), answer["refused"]
    right = "right" if answer["text"] == oracle.text else "another text"
    oracle.text = answer["text"]
    fault = oracle.fault(answer["text"], [(start, end) for start, end in answer["spans"]])
    return ("wrong", fault) if fault else (right, "")


FAULTS = {
    "foreign words": ("q is trained", "a span over messages"),
    "headers": ("a role marker is trained", "prompt is trained", "the turn is trained", "two stops"),
    "too little": ("not trained", "no stop is trained", "not printed", "one of several"),
}
"""Kinds of wrong masks, with the oracle's words.

Text of others is trained; template text before or after a turn is trained; a text of the assistant
or its stop is missing.
"""


def fault_kind(detail: str) -> str:
    """Return the kind of a wrong mask, by the oracle's words."""
    return next(kind for kind, words in FAULTS.items() if any(word in detail for word in words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--peer", action="append", default=[], help="PEER=PYTHON; PEER: trl, axolotl, automodel")
    parser.add_argument("--wrong", type=argparse.FileType("w"), help="file for the wrong masks of peers")
    arguments = parser.parse_args()
    paths = [p for path in arguments.paths for p in (sorted(path.glob("*.jinja")) if path.is_dir() else [path])]
    counts = {"sftstream": Counter(case.verdict for path in paths for case in judge.judge(path))}
    opened = list(encoders(paths))
    for peer, python in (given.split("=", 1) for given in arguments.peer):
        with tempfile.TemporaryDirectory() as directory:
            lines = [(path, *case) for path, encoder in opened for case in cases(path, encoder, Path(directory))]
            answered = answers(peer, python, [line for _, _, line in lines])
        counts[peer] = Counter()
        for (path, oracle, line), answer in zip(lines, answered, strict=True):
            kind, detail = verdict(oracle, answer)
            counts[peer][kind] += 1
            counts[peer].update([f"wrong: {fault_kind(detail)}"] if kind == "wrong" else [])
            if arguments.wrong and kind not in ("right", "raises"):
                print(
                    peer, kind, path.stem, [m["role"] for m in line["messages"]], detail, sep="\t", file=arguments.wrong
                )
    faults = [f"wrong: {kind}" for kind in FAULTS]
    columns = ("right", "wrong", *faults, "another text", "lossless", "refused", "raises")
    print("| system | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for system, verdicts in counts.items():
        print(f"| {system} | " + " | ".join(str(verdicts[column]) for column in columns) + " |")


if __name__ == "__main__":
    main()

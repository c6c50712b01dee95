"""Let the model under training answer held-out questions, without an effect on the training.

All ranks generate together with the model as it is spread over them, so that no copy is made. The
questions are cut into packs of the capacity of training. Example with a capacity of 8, two new
tokens at most, and questions of 3 and 2 tokens: each question has a segment with room for its
answer, and a step of generation writes a token into each.

| place         | 0  | 1  | 2  | 3 | 4  | 5  | 6 | 7       |
|---------------|----|----|----|---|----|----|---|---------|
| segment       | 0  | 0  | 0  | 0 | 1  | 1  | 1 | padding |
| first pass    | q0 | q0 | q0 | - | q1 | q1 | - | -       |
| second pass   | q0 | q0 | q0 | a | q1 | q1 | a | -       |

Attention is causal, so the room after the last token changes nothing. The shapes of all passes are
those of training. There is no key-value cache: each new token costs a forward pass over its pack.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sftstream import ChatEncoder
from trainer.config import EvaluationConfig
from trainer.distributed.mesh import Topology
from trainer.distributed.watch import Watch
from trainer.llama.attention import Segments
from trainer.llama.model import Llama
from trainer.llama.parallel import reshard
from trainer.llama.sharding import gather_full
from trainer.training.evaluation import Question, judge, write_answers
from trainer.training.scorer import Scorer


class AnswerScores(NamedTuple):
    """The result of an evaluation, equal on every rank."""

    exact_match: float
    """Share of the answers that equal the expected answer, in [0, 1]."""
    score: float | None
    """Mean of the scores by `evaluation.scorer`; None without a scorer."""

    @property
    def judged(self) -> float:
        """Number that falls as answers get better, for `checkpoint.keep_best` and `patience`."""
        return 1 - (self.exact_match if self.score is None else self.score)


class Questions(NamedTuple):
    """The questions of a pack of one rank, and the tokens of the pack so far."""

    numbers: list[int]
    ids: Tensor
    """int64 `(capacity,)`, on the CPU."""
    position_ids: Tensor
    """int64 `(capacity,)`: the place of each token in its segment."""
    segments: list[int]
    """Borders of the segments."""
    last: list[int]
    """Place of each question's last token."""


class HeldOutQuestions:
    """The questions of a run, which the model under training answers. Collective.

    `questions`, `encoder` and `scorer` are those of the first rank. Raises ValueError if a question
    exceeds `capacity` with its answer.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        topology: Topology,
        capacity: int,
        questions: Sequence[Question],
        encoder: ChatEncoder | None,
        scorer: Scorer | None,
        directory: Path,
    ) -> None:
        self._config, self._topology, self._capacity = config, topology, capacity
        self._questions, self._encoder, self._scorer = questions, encoder, scorer
        self._directory = directory / "answers"
        prompts: list[list[int]] = []
        if topology.first:
            assert encoder is not None
            prompts = [encoder.tokenizer.ids(q.prompt) for q in questions]
        box = [(prompts, encoder.stop_ids if encoder else [], self._digest())]
        dist.broadcast_object_list(box)
        self._prompts, self._stops, self.digest = box[0]
        self._require_room()
        shards = [self._divided(shard) for shard in range(topology.dp)]
        mine = shards[topology.shard.index]
        # All ranks make the same number of passes, some of them without a question.
        self._mine = mine + [[]] * (max(map(len, shards)) - len(mine))

    def _require_room(self) -> None:
        for number, prompt in enumerate(self._prompts, 1):
            if self._room(prompt) > self._capacity:
                raise ValueError(
                    f"evaluation.path, conversation {number}: the question has {len(prompt)} tokens, and with an answer of "
                    f"evaluation.max_new_tokens = {self._config.max_new_tokens} exceeds data.capacity = {self._capacity}; "
                    "lower max_new_tokens, or remove the row"
                )

    def after(self, step: int, model: Llama, watch: Watch) -> AnswerScores | None:
        """Return the scores of the answers after `step`, or None if `step` is not due. Collective.

        The first rank writes the answers to `answers/<step>.jsonl` in the run's directory.
        """
        if self._config.every is None or step % self._config.every:
            return None
        found: dict[int, list[int]] = {}
        for numbers in self._mine:
            found |= self._answer(self._pack(numbers), model, step, watch)
        reshard(model)
        everyone: list[dict[int, list[int]]] | None = [{}] * dist.get_world_size() if self._topology.first else None
        dist.gather_object(found, everyone)
        box: list[AnswerScores | None] = [None]
        if everyone is not None:
            box = [self._scores(step, {number: ids for part in everyone for number, ids in part.items()})]
        dist.broadcast_object_list(box)
        return box[0]

    def _scores(self, step: int, answers: dict[int, list[int]]) -> AnswerScores:
        assert self._encoder is not None
        given = [self._encoder.tokenizer.hf.decode(answers[number]) for number in range(len(self._questions))]
        evaluation = judge(self._questions, given, self._scorer)
        self._directory.mkdir(exist_ok=True)
        write_answers(self._directory / f"{step:08d}.jsonl", evaluation)
        return AnswerScores(evaluation.accuracy, evaluation.score)

    def _digest(self) -> str:
        """Return the hash of all that scores depend on, beside the model."""
        facts = [*map(list, self._questions), self._config.max_new_tokens, self._config.scorer]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _room(self, prompt: Sequence[int]) -> int:
        """Return the tokens of a question's segment; nothing follows an answer's last token."""
        return len(prompt) + self._config.max_new_tokens - 1

    def _divided(self, shard: int) -> list[list[int]]:
        """Return the numbers of the questions in each pack of a data-parallel coordinate: every
        dp-th question, in order."""
        packs: list[list[int]] = []
        room = 0
        for number in range(shard, len(self._prompts), self._topology.dp):
            needed = self._room(self._prompts[number])
            if not packs or room < needed:
                packs.append([])
                room = self._capacity
            packs[-1].append(number)
            room -= needed
        return packs

    def _pack(self, numbers: list[int]) -> Questions:
        ids, position_ids = torch.zeros(2, self._capacity, dtype=torch.int64)
        borders, last = [0], []
        for number in numbers:
            prompt, start = self._prompts[number], borders[-1]
            ids[start : start + len(prompt)] = torch.tensor(prompt)
            last.append(start + len(prompt) - 1)
            borders.append(start + self._room(prompt))
        borders += [self._capacity] if borders[-1] < self._capacity else []
        for start, end in itertools.pairwise(borders):
            position_ids[start:end] = torch.arange(end - start)
        return Questions(numbers, ids, position_ids, borders, last)

    @torch.no_grad()
    def _answer(self, pack: Questions, model: Llama, step: int, watch: Watch) -> dict[int, list[int]]:
        """Return the ids of the greedy answer to each question of a pack. Collective.

        Ranks whose answers have ended go on until those of all ranks have.
        """
        device = self._topology.device
        position_ids = pack.position_ids.to(device)
        borders = torch.tensor(pack.segments, dtype=torch.int32)
        segments = Segments(borders.to(device), int(borders.diff().max()))
        answers: list[list[int]] = [[] for _ in pack.numbers]
        for _ in range(self._config.max_new_tokens):
            open_ones = [n for n, answer in enumerate(answers) if not answer or answer[-1] not in self._stops]
            left = torch.tensor(len(open_ones))
            with watch.waiting_for(step, "the answers of all ranks"):
                dist.all_reduce(left)
                if not left:
                    break
                places = torch.tensor(pack.last) + torch.tensor([len(answer) for answer in answers])
                logits = model(pack.ids.to(device), position_ids, segments, places.long().to(device))
                chosen = gather_full(logits).float().argmax(1).tolist()
            for n in open_ones:
                answers[n].append(chosen[n])
                if len(answers[n]) < self._config.max_new_tokens:
                    pack.ids[pack.last[n] + len(answers[n])] = chosen[n]
        return dict(zip(pack.numbers, answers, strict=True))

"""DPO with a custom loss, and reinforcement learning, with the client ``tinker``.

The program runs in a process of its own, where another version of the client may be installed. It
prints the curves as JSON.

Usage: tinker_loops.py BASE_URL MODEL TOKENIZER dpo|rl STEPS
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import tinker  # type: ignore[import-not-found]
import torch
from tinker import types  # type: ignore[import-not-found]
from transformers import AutoTokenizer

# Prompts with an answer; the adapter should learn to prefer answers without capital letters.
QUESTIONS = (
    ("Name a fruit.", "An apple."),
    ("Name a colour.", "Blue."),
    ("Name an animal.", "A dog."),
    ("What do cows drink?", "They drink water."),
    ("What is frozen water?", "It is ice."),
    ("Where do fish live?", "In water."),
    ("What do bees make?", "They make honey."),
    ("What is two plus two?", "Four."),
    ("When is it dark?", "At night."),
    ("What falls from clouds?", "Rain."),
    ("What do birds have?", "They have wings."),
    ("What is hot?", "The sun."),
)
HELD_OUT = (
    ("Name a vegetable.", "A carrot."),
    ("What is cold?", "Snow."),
    ("Where do birds live?", "In trees."),
    ("What do cats drink?", "They drink milk."),
)
BETA = 0.1


def result(promise: Any) -> Any:
    """The result of a method: a future in newer versions, and sometimes the value in older ones."""
    return promise.result() if hasattr(promise, "result") else promise


class Program:
    """The training of a new adapter, and the tokens of its texts."""

    def __init__(self, url: str, model: str, tokenizer: str) -> None:
        self.service = tinker.ServiceClient(base_url=url, api_key="tml-test")
        self.client = result(
            self.service.create_lora_training_client(
                base_model=model, rank=8, seed=1, train_unembed=False
            )
        )
        self.tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer)

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def text(self, tokens: list[int]) -> str:
        # The name of an end token would count as a word without capital letters.
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def prompt(self, question: str) -> list[int]:
        return self.tokens(f"Question: {question}\nAnswer:")

    def step(self, learning_rate: float) -> None:
        adam = types.AdamParams(learning_rate=learning_rate, grad_clip_norm=1.0)
        result(self.client.optim_step(adam))


def datum(prompt: list[int], answer: list[int], **inputs: list[float]) -> types.Datum:
    """A text whose loss inputs are those of the answer's tokens, and 0 before them."""
    before = [0.0] * (len(prompt) - 1)
    arrays = {"target_tokens": np.array([*prompt, *answer][1:], np.int64)}
    arrays |= {name: np.array(before + each, np.float32) for name, each in inputs.items()}
    tensors = {name: types.TensorData.from_numpy(array) for name, array in arrays.items()}
    tokens = types.ModelInput.from_ints([*prompt, *answer][:-1])
    return types.Datum(model_input=tokens, loss_fn_inputs=tensors)


def pairs_of(program: Program, questions: Any) -> list[types.Datum]:
    """The preferred and the other answer to each question."""
    data = []
    for question, answer in questions:
        for text in (answer.lower(), answer):
            tokens = program.tokens(f" {text}")
            data.append(datum(program.prompt(question), tokens, weights=[1.0] * len(tokens)))
    return data


def answer_logprobs(data: list[types.Datum], logprobs: Any) -> torch.Tensor:
    """The sum of the logprobs of each answer's tokens, ``[pairs, 2]``."""
    sums = [
        (torch.as_tensor(each) * torch.tensor(one.loss_fn_inputs["weights"].tolist())).sum()
        for one, each in zip(data, logprobs, strict=True)
    ]
    return torch.stack(sums).view(-1, 2)


def train_by_preference(program: Program, steps: int) -> dict[str, Any]:
    """DPO (arXiv 2305.18290); the reference is the adapter before training, which is the base."""
    train, held_out = pairs_of(program, QUESTIONS), pairs_of(program, HELD_OUT)

    def scored(data: list[types.Datum]) -> torch.Tensor:
        found = result(program.client.forward(data, "cross_entropy")).loss_fn_outputs
        return answer_logprobs(data, [each["logprobs"].tolist() for each in found])

    reference, of_held_out = scored(train), scored(held_out)

    def loss_of(data: Any, logprobs: Any) -> tuple[torch.Tensor, dict[str, float]]:
        gains = answer_logprobs(train, logprobs) - reference
        margins = gains[:, 0] - gains[:, 1]
        loss = -torch.nn.functional.logsigmoid(BETA * margins).mean()
        return loss, {"dpo": float(loss.detach()), "margin": float(margins.detach().mean())}

    curve = []
    for _ in range(steps):
        passed = program.client.forward_backward_custom(train, loss_of).result()
        program.step(3e-4)
        curve.append([passed.metrics["dpo"], passed.metrics["margin"]])
    after = scored(held_out)
    return {
        "curve": curve,
        # The share of pairs in which the preferred answer is likelier.
        "before": float((of_held_out[:, 0] > of_held_out[:, 1]).float().mean()),
        "after": float((after[:, 0] > after[:, 1]).float().mean()),
    }


def reward(text: str) -> float:
    """1 for an answer with letters, none of which is a capital."""
    return float(text == text.lower() and any(each.isalpha() for each in text))


def train_by_reward(program: Program, steps: int) -> dict[str, Any]:
    """Importance sampling with the mean reward of a prompt's samples as the baseline."""
    curve, ratios, answers = [], [], []
    for step in range(steps):
        sampler = result(program.client.save_weights_and_get_sampling_client())
        asked = []
        for number, (question, _) in enumerate(QUESTIONS[:6]):
            prompt = program.prompt(question)
            params = types.SamplingParams(max_tokens=8, temperature=1.0, seed=100 * step + number)
            samples = sampler.sample(
                prompt=types.ModelInput.from_ints(prompt), num_samples=8, sampling_params=params
            )
            asked.append((prompt, samples))
        data, rewards = [], []
        for prompt, samples in asked:
            sequences = samples.result().sequences
            answers = [program.text(each.tokens) for each in sequences]
            found = [reward(answer) for answer in answers]
            rewards += found
            for each, own in zip(sequences, found, strict=True):
                tokens, logprobs = list(each.tokens), list(each.logprobs)
                advantage = own - sum(found) / len(found)
                advantages = [advantage] * len(tokens)
                data.append(datum(prompt, tokens, logprobs=logprobs, advantages=advantages))
        passed = result(program.client.forward_backward(data, "importance_sampling"))
        for one, output in zip(data, passed.loss_fn_outputs, strict=True):
            sampled = np.array(one.loss_fn_inputs["logprobs"].tolist(), np.float32)
            computed = np.array(output["logprobs"].tolist(), np.float32)
            ratios += (computed == sampled)[sampled != 0].tolist()
        program.step(4e-4)
        curve.append(sum(rewards) / len(rewards))
    return {"curve": curve, "answers": answers, "exact": all(ratios), "tokens": len(ratios)}


def main(url: str, model: str, tokenizer: str, loop: str, steps: str) -> dict[str, Any]:
    program = Program(url, model, tokenizer)
    loops = {"dpo": train_by_preference, "rl": train_by_reward}
    return {"version": tinker.__version__, **loops[loop](program, int(steps))}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))

"""Conversations: what is read, what becomes a target, what shares a sample, and what is refused."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import TINY_MODEL

from scaling.data.build import build_datasets
from scaling.data.chat import open_chat_data
from scaling.data.conversations import Message, Said, pieces
from scaling.data.packing import pack
from scaling.errors import UserError
from scaling.models.build import model_recipe
from scaling.objectives import build_objective
from scaling.records import IGNORED
from scaling.spec.sections import ChatData, Spec

TURNS = [("What is 2 + 2?", "4"), ("And doubled?", "8, of course")]


def written(folder: Path, *records: object, name: str = "chat.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return str(path)


def chat(folder: Path, **fields) -> ChatData:
    defaults = {"train": [str(folder / "chat.jsonl")], "validation": 0, "sequence_length": 128}
    return ChatData(kind="chat", cache=str(folder / "cache"), **(defaults | fields))


def opened(folder: Path, *, spoken_only: bool = True, **fields):
    return open_chat_data(chat(folder, **fields), 256, spoken_only=spoken_only)[0]


def dolly(question: str, answer: str, context: str = "") -> dict[str, str]:
    return {"instruction": question, "context": context, "response": answer, "category": "open_qa"}


def inputs_of(batch, row: int = 0) -> str:
    return bytes(batch.inputs[row].tolist()).rstrip(b"\0").decode()


def targets_of(batch, row: int = 0) -> bytes:
    return bytes(token for token in batch.targets[row].tolist() if token != IGNORED)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]},
        {"conversations": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]},
        {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Ho."}]},
        {"instruction": "Hi?", "context": "", "response": "Ho.", "category": "chat"},
        {"instruction": "Hi?", "input": "", "output": "Ho."},
    ],
)
def test_every_form_says_the_same(tmp_path, record):
    written(tmp_path, record)
    batch = opened(tmp_path).read(np.array([0]))
    assert inputs_of(batch) == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nHo.<|im_end|"
    assert targets_of(batch) == b"Ho.<|im_end|>"


def test_a_context_follows_its_instruction(tmp_path):
    written(tmp_path, dolly("Who?", "Ann.", "Ann came."))
    assert "user\nWho?\n\nAnn came.<|im_end|>" in inputs_of(opened(tmp_path).read(np.array([0])))


def test_in_several_turns_the_targets_are_what_the_assistant_says(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}]
    for question, answer in TURNS:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    written(tmp_path, {"messages": messages})
    batch = opened(tmp_path, sequence_length=256).read(np.array([0]))
    assert targets_of(batch) == b"4<|im_end|>8, of course<|im_end|>" and batch.terms == 33
    everybody = opened(tmp_path, sequence_length=256, spoken_only=False).read(np.array([0]))
    assert targets_of(everybody)[:-1].decode() == inputs_of(everybody)[1:]
    # Each target is the token that follows its input.
    followed = batch.targets[0, :-1] != IGNORED
    assert torch.equal(batch.targets[0, :-1][followed][:-1], batch.inputs[0, 1:][followed][:-1])


def test_the_instruction_template_ends_a_response_with_the_end_of_text(tmp_path):
    written(tmp_path, dolly("Hi?", "Ho."))
    batch = opened(tmp_path, template="instruction").read(np.array([0]))
    assert inputs_of(batch) == "### Instruction:\nHi?\n\n### Response:\nHo." and targets_of(batch) == b"Ho.\0"


def test_neighbouring_pieces_are_tokenised_as_one_text():
    found = pieces(Said([Message("system", "S"), Message("user", "U"), Message("assistant", "A")]), "chatml")
    assert [piece.spoken for piece in found] == [False, True] and found[1].text == "A<|im_end|>"


def conversations(count: int) -> list[dict[str, str]]:
    return [dolly(f"Number {index}?", "x" * (index % 37 + 1)) for index in range(count)]


def test_packing_loses_nothing_and_wastes_little(tmp_path):
    written(tmp_path, *conversations(300))
    packed, alone = opened(tmp_path, sequence_length=512), opened(tmp_path, sequence_length=512, packing=False)
    assert sorted(number for row in packed.rows for number in row) == list(range(300)) and len(alone) == 300
    everything = packed.read(np.arange(len(packed)))
    assert everything.terms == alone.read(np.arange(300)).terms
    room = (everything.inputs != 0).float().mean()
    assert room > 0.9 > 2 * (alone.read(np.arange(300)).inputs != 0).float().mean()


def test_best_fit_is_deterministic_and_within_what_is_known_of_it():
    lengths = np.random.default_rng(3).integers(1, 101, 5000)
    found = pack(lengths, 100)
    assert found == pack(lengths, 100)
    assert sorted(text for sample in found for text in sample) == list(range(5000))
    assert max(int(lengths[sample].sum()) for sample in found) <= 100
    assert len(found) <= 11 / 9 * -(-lengths.sum() // 100) + 1  # Johnson, 1973


SHAPES = {
    "learned": {"position": "learned", "norm": "layernorm", "activation": "gelu", "bias": True},
    "rope": {"num_key_value_heads": 1},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss", ["chunked", "plain"])
def test_packed_and_alone_have_one_loss_and_one_gradient(tmp_path, shape, loss):
    written(tmp_path, *conversations(12))
    model = {**TINY_MODEL, "vocab_size": 256, "max_position_embeddings": 256, **SHAPES[shape]}
    found = []
    for packing in (True, False):
        values = {
            "name": "t",
            "model": model,
            "objective": {"kind": "sft", "cross_entropy": loss},
            "max_steps": 1,
            "data": chat(tmp_path, sequence_length=256, packing=packing).model_dump(),
            "batch": {"global_batch_size": 1},
            "optimizer": {"lr": 1e-3},
        }
        spec = Spec.model_validate(values)
        recipe, dataset = model_recipe(spec), build_datasets(spec)[0]
        module = recipe.build()
        for name, parameter in module.named_parameters():
            parameter.data = recipe.initial_value(name, parameter.shape) * 5  # so that attention attends to something
        batch = dataset.read(np.arange(len(dataset)))
        assert len(batch.inputs) < 12 if packing else len(batch.inputs) == 12
        total = build_objective(spec.objective)(module, batch)
        total.backward()
        found.append((total.detach(), {name: p.grad for name, p in module.named_parameters()}))
    (packed, grads), (alone, others) = found
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=0)
    largest = max(float(grad.abs().max()) for grad in grads.values())
    for name, grad in grads.items():
        torch.testing.assert_close(grad, others[name], rtol=1e-4, atol=1e-6 * largest, msg=name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": ', "the line must be JSON, but is not"),
        ("[1]", "the line must be a JSON object, but is a list"),
        ('{"prompt": "x"}', "`instruction` and `response`, but has `prompt`"),
        ({"instruction": "x"}, "`output` must be text, but is absent"),
        ({"instruction": "x", "response": "  "}, "`response` must be text, but is empty"),
        ({"instruction": "x", "response": 3}, "`response` must be text, but is a number"),
        ({"messages": []}, "`messages` must be a list of messages, but is empty"),
        ({"messages": [{"role": "user", "content": "x"}]}, "must have a message of the assistant, but has none"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "`messages.0.role` must be one of system, user, assistant"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "`conversations.0.value` must be text, but is null"),
        ({"conversations": ["x"]}, "`conversations.0` must be an object, but is text"),
        ("\xff", "must be UTF-8, but is not at byte 0"),
    ],
)
def test_a_line_that_is_no_conversation_is_named_or_counted(tmp_path, caplog, line, message):
    path = tmp_path / "chat.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    path.write_bytes(json.dumps(dolly("Hi?", "Ho.")).encode() + b"\n\n" + text.encode("latin-1") + b"\n")
    with pytest.raises(UserError) as raised:
        opened(tmp_path)
    assert f"{path}:3: " in str(raised.value) and message in str(raised.value), raised.value
    for _ in range(2):  # also when the tokens come from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert len(opened(tmp_path, malformed="skip")) == 1
        assert any("1 lines of `data.train` are left out" in message for message in caplog.messages)


def test_what_is_too_long_is_cut_off_left_out_or_refused(tmp_path, caplog):
    written(tmp_path, dolly("Hi?", "Ho."), dolly("Long?", "x" * 100), dolly("y" * 100, "Never seen."))
    with caplog.at_level(logging.WARNING):
        cut = opened(tmp_path, sequence_length=80, packing=False)
    assert len(cut) == 2 and cut.read(np.array([1])).inputs[0, -1] == ord("x")
    assert any("2 of 3 conversations" in m and "cut off at the end" in m for m in caplog.messages)
    assert any("1 of 3 conversations" in m and "have no target" in m for m in caplog.messages)
    assert len(opened(tmp_path, sequence_length=80, too_long="skip")) == 1
    with pytest.raises(UserError, match=r"at most 81 tokens .* but 2 of 3 are longer, the longest "):
        opened(tmp_path, sequence_length=80, too_long="refuse")
    with pytest.raises(UserError, match="must hold conversations with a target"):
        opened(tmp_path, sequence_length=16)


def test_held_out_conversations_are_chosen_by_what_they_say(tmp_path):
    records = conversations(400)
    written(tmp_path, *records, *records[:50])
    train, held_out = open_chat_data(chat(tmp_path, validation=0.1, packing=False), 256, spoken_only=True)
    texts = [{inputs_of(part.read(np.array([i]))) for i in range(len(part))} for part in (train, held_out)]
    assert not texts[0] & texts[1] and len(texts[0] | texts[1]) == 400 and 20 < len(texts[1]) < 65
    written(tmp_path, *reversed(records))
    again = open_chat_data(chat(tmp_path, validation=0.1, packing=False), 256, spoken_only=True)[1]
    assert {inputs_of(again.read(np.array([i]))) for i in range(len(again))} == texts[1]
    with pytest.raises(UserError, match="must leave conversations to train on"):
        written(tmp_path, records[0])
        open_chat_data(chat(tmp_path, validation=0.1), 256, spoken_only=True)


def test_validation_files_stand_apart(tmp_path):
    written(tmp_path, *conversations(5))
    other = written(tmp_path, dolly("Else?", "Yes."), name="other.jsonl")
    train, held_out = open_chat_data(chat(tmp_path, validation=[other]), 256, spoken_only=True)
    assert "Else?" in inputs_of(held_out.read(np.array([0]))) and len(train.conversations) == 5
    with pytest.raises(UserError, match="must not share files"):
        open_chat_data(chat(tmp_path, validation=[str(tmp_path / "*.jsonl")]), 256, spoken_only=True)


def test_the_fingerprint_says_what_the_samples_are(tmp_path):
    written(tmp_path, *conversations(20))
    first = opened(tmp_path).fingerprint
    assert opened(tmp_path).fingerprint == first != opened(tmp_path, packing=False).fingerprint
    written(tmp_path, *conversations(21))
    assert opened(tmp_path).fingerprint != first


def test_other_files_are_refused(tmp_path):
    written(tmp_path, "text", name="notes.txt")
    with pytest.raises(UserError, match=r"`data.train` must match .jsonl files"):
        opened(tmp_path, train=[str(tmp_path / "*.txt")])


def test_the_standard_library_explains_itself(tmp_path, monkeypatch):
    import textwrap as module

    monkeypatch.setattr("scaling.data.chat.matching_files", lambda *_, **__: [Path(module.__file__)])
    dataset = opened(tmp_path, train=["python-stdlib"], sequence_length=1024, packing=False)
    texts = [
        (inputs_of(batch), targets_of(batch)) for i in range(len(dataset)) if (batch := dataset.read(np.array([i])))
    ]
    (found,) = [pair for pair in texts if "def dedent(" in pair[0]]
    assert found[1] == b"Remove any common leading whitespace from every line in `text`.<|im_end|>"
    assert found[0].count("Remove any common") == 1  # in the answer, and not in the code too


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"kind": "synthetic", "sequence_length": 16}}, '`data.kind` must be "chat" for the objective "sft"'),
        ({"model": {**TINY_MODEL, "vocab_size": 255}}, "`model.vocab_size` must be at least 256"),
    ],
)
def test_specs_that_cannot_be(tmp_path, changes, message):
    values = {
        "name": "t",
        "model": {**TINY_MODEL, "vocab_size": 256},
        "objective": {"kind": "sft"},
        "max_steps": 1,
        "data": chat(tmp_path, sequence_length=16).model_dump(),
        "batch": {"global_batch_size": 1},
        "optimizer": {"lr": 1e-3},
    }
    Spec.model_validate(values)
    with pytest.raises(ValueError, match="must") as raised:
        Spec.model_validate(values | changes)
    assert message in str(raised.value)


def test_sft_and_causal_lm_differ_in_their_targets_alone(tmp_path):
    written(tmp_path, *conversations(3))
    spoken, everybody = (opened(tmp_path, spoken_only=spoken).read(np.array([0])) for spoken in (True, False))
    assert torch.equal(spoken.inputs, everybody.inputs) and spoken.terms < everybody.terms

"""Model and data of nanoGPT."""

from scaling.spec.foreign.draft import Draft
from scaling.spec.foreign.nanogpt_keys import NANOGPT

_MODEL = ("n_layer", "n_head", "n_embd", "vocab_size", "dropout", "bias")
SOURCE = "as nanoGPT's model.py has it"
"""Of what the file does not say."""


def put_model(draft: Draft) -> None:
    """GPT-2's shape, of which the file has the sizes."""
    if not any(key in draft.given for key in _MODEL):
        return
    draft.put("model.kind", "decoder")
    for key in ("n_layer", "n_head", "n_embd", "vocab_size"):
        draft.move(NANOGPT.carried[key], draft.whole(key))
    draft.move("model.max_position_embeddings", draft.whole("block_size"))
    draft.move("model.dropout", draft.number("dropout"))
    draft.move("model.bias", draft.flag("bias"))
    width = draft.whole("n_embd")
    if width is not None:
        draft.assume("model.intermediate_size", 4 * width, f"4 x n_embd, {SOURCE}")
    shape = {
        "norm": "layernorm",
        "activation": "gelu",
        "position": "learned",
        "bias": True,
        "tie_word_embeddings": True,
    }
    for name, value in shape.items():
        draft.assume(f"model.{name}", value, SOURCE)


def put_data(draft: Draft) -> None:
    """The token files of a dataset, where nanoGPT's data/NAME/prepare.py writes them."""
    length, name = draft.whole("block_size"), draft.text("dataset")
    if length is None and name is None:
        return
    draft.put("data.kind", "tokens")
    draft.move("data.sequence_length", length)
    if name is not None:
        draft.put("data.train", [f"data/{name}/train.bin"])
        draft.put("data.validation", [f"data/{name}/val.bin"])
        draft.notes.append(
            f"`dataset` becomes `data.train` data/{name}/train.bin and val.bin, of uint16, as train.py reads"
        )
    else:
        draft.notes.append("`data.kind` is assumed to be tokens, .bin or .npy files as nanoGPT reads them; check it")

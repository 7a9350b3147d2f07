"""Tiny random checkpoints of every proven family, saved in the layout of its published ones.

Each folder holds what a hub repository holds: the config, the weights of the ``…ForConditionalGeneration`` class, a
tokenizer without MuCo's tokens, and the settings of the family's own processor. ``checkpoint`` and ``model`` build and
load once per process; tests must not change what they return.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import muco
from muco.backbone import QWEN_PADS, QWEN_TOKENS, train_tokenizer
from muco.dialogue import Content, Dialogue
from muco.encoder import Model

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FAMILIES = (*QWEN, "idefics3")
TEXTS = (
    "What type of jewelry is this? A ring with a square-cut stone and four prongs.",
    "Describe the image. There are 12 red circles, 3 small green squares and 1 large blue star on a plain background.",
    "It's the user's question: how many shapes do you see, and where are they?",
    "The assistant answers:\nthe shapes are in the upper left, the middle and the lower right.",
    "Which colour has the largest shape?\n\nBlue (light blue, to be exact); the second is green.",
    "User: Provide a detailed description of the item presented.\nAssistant: A narrow silver band.",
)
# so that runs of white space are tokens, as they are in published vocabularies: only then can a bad cut be seen
TRAINING_TEXTS = (*TEXTS, *("One.\n\nTwo.\n \nThree.\n\t\nFour.\n\n\nFive.\r\n\r\nSix.\n  ",) * 50)
WIDTH = 64  # of every tiny language model: 4 heads of 16


def image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coarse coloured noise: unlike pixel noise it survives every resizing."""
    cells = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.NEAREST)


def checkpoint(family: str) -> Path:
    """The folder of a plain checkpoint, built on first use."""
    return _checkpoint(family)  # the cache keys on how a function is called, so all calls take this one way


@cache
def _checkpoint(family: str) -> Path:
    return build(family, scratch() / family)


@cache
def model(family: str) -> Model:
    """The plain checkpoint as ``muco.load`` gives it, in float32 on the CPU."""
    return muco.load(checkpoint(family), device="cpu", local_files_only=True)


@cache
def scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="muco-families-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def vectors(model: Model, dialogues: Iterable[Dialogue]) -> np.ndarray:
    """The vectors of all turns of all dialogues, computed in one padded batch."""
    with torch.inference_mode():
        return model(model.encoder.collate(list(dialogues)))["sentence_embedding"].numpy()


def alone(dialogues: Iterable[Dialogue]) -> list[Dialogue]:
    """Each turn as the single-turn dialogue that it is equal to when turns are isolated."""
    return [Dialogue(d.context, (turn,)) for d in dialogues for turn in d.turns]


def ragged(*, isolated: bool = True) -> list[Dialogue]:
    """Query and target dialogues of unequal lengths with images on both sides, and texts that are hard to cut."""
    wide, tall, square = image(150, 64, 1), image(57, 130, 2), image(84, 84, 3)

    def dialogue(context: tuple[Image.Image, ...], *turns: Content | str) -> Dialogue:
        contents = tuple(turn if isinstance(turn, Content) else Content(turn) for turn in turns)
        return Dialogue(context, contents, isolated)

    return [
        dialogue(
            (wide,), "", "What type of jewelry is this?", " led by a space", "\n\nled by newlines", "?!, punctuation"
        ),
        dialogue((tall, square), "How many shapes do you see? 12", "3", "the middle\n"),
        dialogue((), "A ring", Content("the largest shape", (square,)), Content("", (wide,)), "\tled by a tab"),
        dialogue((square,), "one turn only"),
        dialogue((), "four prongs"),
        dialogue((), Content("", (tall, wide)), Content(" led by a space", (tall,))),
        dialogue((square,), "and another image", Content("", (tall,)), Content("beside it", (wide, tall))),
    ]


def build(family: str, folder: Path, *, tied: bool = True, tokens: tuple[str, ...] = (), seed: int = 0) -> Path:
    """Writes a plain checkpoint of ``family``; ``tokens`` are special tokens that its tokenizer has besides."""
    folder.mkdir(parents=True)
    processor = _idefics3_processor(folder, tokens) if family == "idefics3" else _qwen_processor(family, folder, tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapper = _idefics3(processor, tied) if family == "idefics3" else _qwen(family, processor, tied)
    wrapper.save_pretrained(folder)
    return folder


def _text_config(tokenizer: Any, pad: str) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,  # wide enough that attention is not uniform and every token leaves its mark
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": tokenizer.convert_tokens_to_ids(pad),
    }


def _qwen(family: str, tokenizer: Any, tied: bool) -> Any:
    import transformers

    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
    text = _text_config(tokenizer, "<|endoftext|>")
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "initializer_range": 0.1}
    if family == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": WIDTH, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": WIDTH}
    if family == "qwen2_5_vl":
        vision |= {"window_size": 56, "fullatt_block_indexes": [1]}  # windows of 2 x 2 visual tokens, then all of them
    if family == "qwen3_vl":
        text |= {"head_dim": WIDTH // 4}
        text["rope_parameters"]["mrope_interleaved"] = True
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    ids = tokenizer.convert_tokens_to_ids
    config = getattr(transformers, f"{name}Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=tied,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _qwen_processor(family: str, folder: Path, tokens: tuple[str, ...]) -> Any:
    tokenizer = train_tokenizer(TRAINING_TEXTS, 600, added=(*QWEN_TOKENS, *QWEN_PADS, *tokens))
    tokenizer.save_pretrained(folder)
    # as published: pixel limits at the top level until Qwen3-VL, there under "size"
    settings: dict[str, Any] = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "merge_size": 2,
        "temporal_patch_size": 2,
    }
    if family == "qwen3_vl":
        settings |= {"patch_size": 16, "size": {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}}
    else:
        settings |= {"patch_size": 14, "min_pixels": 28 * 28, "max_pixels": 112 * 112}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return tokenizer


# One line per message; images and text in the order of the message, a colon with a space before text only.
SMOLVLM_CHAT_TEMPLATE = (
    "<|im_start|>"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% elif part['type'] == 'image' %}<image>{% endif %}"
    "{% endfor %}<end_of_utterance>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
SMOLVLM_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<global-img>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    *("<fake_token_around_image>", "<image>", "<end_of_utterance>"),
)


def smolvlm_tokenizer(tokens: tuple[str, ...] = ()) -> Any:
    """A byte-level BPE tokenizer in the form of SmolVLM's: single digits, GPT-2's own splitting, its special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TRAINING_TEXTS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*SMOLVLM_TOKENS, *tokens)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )


def _idefics3_processor(folder: Path, tokens: tuple[str, ...]) -> Any:
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    # tiles of 28 x 28 pixels = 4 x 4 patches = 2 x 2 visual tokens; the longer side has two tiles
    image_processor = Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    image_processor.save_pretrained(folder)
    tokenizer = smolvlm_tokenizer(tokens)
    tokenizer.save_pretrained(folder)
    settings = {"processor_class": "Idefics3Processor", "image_seq_len": 4}
    (folder / "processor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": SMOLVLM_CHAT_TEMPLATE}), encoding="utf-8")
    return tokenizer


def _idefics3(tokenizer: Any, tied: bool) -> Any:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    config = Idefics3Config(
        text_config={"model_type": "llama", **_text_config(tokenizer, "<|im_end|>")},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 7,
            "initializer_range": 0.1,
        },
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=tied,
    )
    return Idefics3ForConditionalGeneration(config)

"""Tiny random checkpoints of many more families, each in the layout of its published ones.

``FAMILIES`` maps a name to what builds it and to what it needs besides; ``families.build`` and ``families.checkpoint``
reach all of them by name. Each has the family's own architecture and processor settings, a tokenizer of its kind, its
chat template in short (the rendering of users, assistants and images, without tools), and weights of which none is
exactly 0 or 1, so that a value that takes a wrong path, or none, can be seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import SMOLVLM_CHAT_TEMPLATE, TRAINING_TEXTS, WIDTH, smolvlm_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True}
SQUARE = {"height": 28, "width": 28}  # of most vision towers: 4 x 4 patches of 7 pixels
TILES = {"crop_to_patches": True, "min_patches": 1, "max_patches": 4, "size": SQUARE}
SLIDING = 12  # tokens of the windows of the "_window" families: shorter than most prompts


@dataclass(frozen=True)
class Parts:
    """What a folder is written from.

    Args:
        name: Of the classes: ``{name}Config`` and ``{name}ForConditionalGeneration``.
        nested: All settings are in processor_config.json, as transformers writes them since version 5.
        template_file: chat_template.jinja, chat_template.json or tokenizer_config.json.
    """

    name: str
    tokenizer: Any
    config: Mapping[str, Any]
    image: Mapping[str, Any]
    processor: Mapping[str, Any]
    template: str | None
    video: Mapping[str, Any] | None = None
    nested: bool = False
    template_file: str = "chat_template.jinja"


@dataclass(frozen=True)
class Family:
    """``parts`` makes the family's parts, with more special tokens.

    Args:
        torchvision: Its image processor has no version for Pillow.
        whole: The processor as a whole (AutoProcessor) asks for torchvision, for videos above all.
        packages: Other optional packages that its own processor needs.
    """

    parts: Callable[[tuple[str, ...]], Parts]
    torchvision: bool = False
    whole: bool = False
    packages: tuple[str, ...] = ()


def build(family: str, folder: Path, *, tied: bool | None = None, tokens: tuple[str, ...] = (), seed: int = 0) -> Path:
    """Writes a plain checkpoint of ``family`` into a folder; ``tied`` is the family's own choice where it is None."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    parts = FAMILIES[family].parts(tokens)
    _write_processor(folder, parts)
    config = dict(parts.config)
    if tied is not None:  # some classes read one place, some the other
        config["tie_word_embeddings"] = tied
        config["text_config"] = {**config["text_config"], "tie_word_embeddings": tied}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = getattr(transformers, f"{parts.name}Config")(**config)
        model = getattr(transformers, f"{parts.name}ForConditionalGeneration")(made)
        _mark(model)
    model.save_pretrained(folder)
    return folder


def _mark(model: torch.nn.Module) -> None:
    """Moves what is 0, 1 or the same everywhere: biases, norms, scales, rows of padding, and buffers that are saved."""
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                same = value.numel() > 1 and value.max() - value.min() < 1e-4
                plain = torch.full_like(value, same).bool() | (value.abs() < 1e-4) | (value == 1)
                value.add_(0.1 * torch.randn_like(value) * plain)


def _write_processor(folder: Path, parts: Parts) -> None:
    files: dict[str, Any] = {"processor_config.json": dict(parts.processor)}
    if parts.nested:
        files["processor_config.json"] |= {"image_processor": parts.image}
        files["processor_config.json"] |= {"video_processor": parts.video} if parts.video else {}
    else:
        files["preprocessor_config.json"] = parts.image
        files |= {"video_preprocessor_config.json": parts.video} if parts.video else {}
    parts.tokenizer.save_pretrained(folder)
    if parts.template is not None and parts.template_file == "chat_template.jinja":
        (folder / parts.template_file).write_text(parts.template, encoding="utf-8")
    elif parts.template is not None:
        file = folder / parts.template_file
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        files[parts.template_file] = before | {"chat_template": parts.template}
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2), encoding="utf-8")


# ── tokenizers ───────────────────────────────────────────────────────────────────────────────────────────────────────

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_WORDS = QWEN_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_level(words: str, special: tuple[str, ...], **roles: Any) -> Any:
    """Byte-level BPE, as Qwen's and Llama 3's; ``words`` is the expression that splits a text before."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(TRAINING_TEXTS, _trainer(initial_alphabet=alphabet))
    return _finished(bpe, special, **roles)


def llama(special: tuple[str, ...], **roles: Any) -> Any:
    """SentencePiece of Llama 2 as converted: a space before every text, and bytes for what no piece has (newlines)."""
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    ends = [decoders.Strip(content=" ", left=1)]
    return _finished(_pieces(r"▁*[^▁\s]+|▁+", steps, ends), special, unk_token="<unk>", **roles)


def gemma(special: tuple[str, ...], **roles: Any) -> Any:
    """SentencePiece of Gemma as converted: spaces are characters of pieces, and runs of newlines are pieces too."""
    pieces = _pieces(r"▁?[^▁\n]+|▁+|\n+", [normalizers.Replace(" ", "▁")], [])
    return _finished(pieces, special, unk_token="<unk>", **roles)


def _pieces(words: str, steps: list[Any], ends: list[Any]) -> Tokenizer:
    taught = Tokenizer(models.BPE())
    taught.normalizer = normalizers.Sequence(steps)
    taught.pre_tokenizer = pre_tokenizers.Split(Regex(words), behavior="removed", invert=True)
    taught.train_from_iterator(TRAINING_TEXTS, _trainer(initial_alphabet=[chr(c) for c in range(33, 127)]))
    core = json.loads(taught.to_str())["model"]
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *core["vocab"]]
    bpe = Tokenizer(
        models.BPE(
            vocab={name: number for number, name in enumerate(names)},
            merges=[tuple(merge) for merge in core["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    bpe.normalizer = taught.normalizer
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    return bpe


def _trainer(**settings: Any) -> Any:
    return trainers.BpeTrainer(vocab_size=500, show_progress=False, **settings)


def _finished(bpe: Tokenizer, special: tuple[str, ...], *, begins: bool = False, **roles: Any) -> Any:
    """With special tokens; ``begins``: ``bos_token`` stands before every text; ``roles`` name tokens."""
    known = {"bos_token", "eos_token", "pad_token", "unk_token"}
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if begins:
        bos = roles["bos_token"]
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bpe.token_to_id(bos))]
        )
    named = {role: token for role, token in roles.items() if role not in known}
    plain = {role: token for role, token in roles.items() if role in known}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, extra_special_tokens=named, **plain)


# ── chat templates ───────────────────────────────────────────────────────────────────────────────────────────────────


def one_line(template: str) -> str:
    """A template without the line breaks and the indentation that it is written with here."""
    return "".join(line.strip() for line in template.splitlines())


LLAVA_CHAT = one_line(r"""
    {% for message in messages %}
        {% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}
        {% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}
        {% for part in message['content'] | selectattr('type', 'equalto', 'text') %}
            {% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}
            {% else %}{{ part['text'] + ' ' }}{% endif %}
        {% endfor %}
    {% endfor %}
    {% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}
""")
LLAVA_NEXT_CHAT = one_line(r"""
    {% for message in messages %}
        {% if message['role'] == 'user' %}
            {{ '[INST] ' }}
            {% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}
            {% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}
            {{ ' [/INST]' }}
        {% elif message['role'] == 'assistant' %}
            {{ ' ' + message['content'][0]['text'] + '</s> ' }}
        {% endif %}
    {% endfor %}
""")
LLAVA_ONEVISION_CHAT = one_line(r"""
    {% for message in messages %}
        {{ '<|im_start|>' + message['role'] + ' ' }}
        {% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}
        {% for part in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}
        {% for part in message['content'] | selectattr('type', 'equalto', 'text') %}
            {{ '\n' + part['text'] }}
        {% endfor %}
        {{ '<|im_end|>' }}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
""")
CHATML_CHAT = one_line(r"""
    {% for message in messages %}
        {{ '<|im_start|>' + message['role'] + '\n' }}
        {% if message['content'] is string %}{{ message['content'] }}
        {% else %}
            {% for part in message['content'] %}
                {% if part['type'] == 'image' %}{{ 'IMAGE' }}
                {% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}
            {% endfor %}
        {% endif %}
        {{ '<|im_end|>\n' }}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
""")
QWEN3_VL_CHAT = CHATML_CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
QWEN3_5_CHAT = one_line(r"""
    {% macro rendered(content) %}
        {% if content is string %}{{ content }}
        {% else %}
            {% for part in content %}
                {% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
                {% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}
            {% endfor %}
        {% endif %}
    {% endmacro %}
    {% for message in messages %}
        {{ '<|im_start|>' + message['role'] + '\n' + rendered(message['content']) | trim + '<|im_end|>\n' }}
    {% endfor %}
    {% if add_generation_prompt %}
        {{ '<|im_start|>assistant\n' }}
        {% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}
        {% else %}{{ '<think>\n' }}{% endif %}
    {% endif %}
""")
GEMMA3_CHAT = one_line(r"""
    {{ bos_token }}
    {% set start = namespace(text='', at=0) %}
    {% if messages[0]['role'] == 'system' %}
        {% set start.at = 1 %}
        {% if messages[0]['content'] is string %}{% set start.text = messages[0]['content'] + '\n\n' %}
        {% else %}{% set start.text = messages[0]['content'][0]['text'] + '\n\n' %}{% endif %}
    {% endif %}
    {% for message in messages[start.at:] %}
        {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
            {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
        {% endif %}
        {{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}
        {{ start.text if loop.first else '' }}
        {% if message['content'] is string %}{{ message['content'] | trim }}
        {% else %}
            {% for part in message['content'] %}
                {% if part['type'] == 'image' %}{{ '<start_of_image>' }}
                {% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}
            {% endfor %}
        {% endif %}
        {{ '<end_of_turn>\n' }}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
""")
GEMMA4_CHAT = one_line(r"""
    {{ bos_token }}
    {% for message in messages %}
        {{ '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}
        {% if message['content'] is string %}{{ message['content'] | trim }}
        {% else %}
            {% for part in message['content'] %}
                {% if part['type'] == 'image' %}{{ '\n\n<|image|>\n\n' }}
                {% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}
            {% endfor %}
        {% endif %}
        {{ '<turn|>\n' }}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}
""")
PALIGEMMA_CHAT = one_line(r"""
    {% for message in messages %}
        {% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}
        {{ bos_token }}
        {% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}
        {{ '\n' }}
    {% endfor %}
""")
GLM4V_CHAT = one_line(r"""
    {{ '[gMASK]<sop>' }}
    {% for message in messages %}
        {{ '\n' if loop.first else '' }}
        {{ '<|' + message['role'] + '|>\n' }}
        {% if message['content'] is string %}{{ message['content'] }}
        {% else %}
            {% for part in message['content'] %}
                {% if part['type'] == 'image' %}{{ '<|begin_of_image|><|image|><|end_of_image|>' }}
                {% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}
            {% endfor %}
        {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}
""")
MISTRAL3_CHAT = one_line(r"""
    {{ bos_token }}
    {% for message in messages %}
        {% if message['role'] == 'user' %}
            {{ '[INST]' }}
            {% if message['content'] is string %}{{ message['content'] }}
            {% else %}
                {% for part in message['content'] %}
                    {% if part['type'] == 'image' %}{{ '[IMG]' }}
                    {% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}
                {% endfor %}
            {% endif %}
            {{ '[/INST]' }}
        {% elif message['role'] == 'system' %}
            {{ '[SYSTEM_PROMPT]' + message['content'][0]['text'] + '[/SYSTEM_PROMPT]' }}
        {% else %}
            {{ message['content'][0]['text'] + eos_token }}
        {% endif %}
    {% endfor %}
""")
AYA_CHAT = one_line(r"""
    {{ bos_token }}
    {% for message in messages %}
        {{ '<|START_OF_TURN_TOKEN|>' }}
        {% if message['role'] == 'user' %}{{ '<|USER_TOKEN|>' }}
        {% elif message['role'] == 'system' %}{{ '<|SYSTEM_TOKEN|>' }}
        {% else %}{{ '<|CHATBOT_TOKEN|><|START_RESPONSE|>' }}{% endif %}
        {% for part in message['content'] %}
            {% if part['type'] == 'image' %}{{ '<image>' }}
            {% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}
        {% endfor %}
        {{ '<|END_RESPONSE|>' if message['role'] == 'assistant' else '' }}
        {{ '<|END_OF_TURN_TOKEN|>' }}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>' }}{% endif %}
""")
GRANITE4_CHAT = one_line(r"""
    {% for message in messages %}
        {{ '<|start_of_role|>' + message['role'] + '<|end_of_role|>' }}
        {% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}
        {% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}
        {{ '<|end_of_text|>\n' }}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}
""")
IDEFICS2_CHAT = one_line(r"""
    {% for message in messages %}
        {{ message['role'].capitalize() + (':' if message['content'][0]['type'] == 'image' else ': ') }}
        {% for part in message['content'] %}
            {% if part['type'] == 'image' %}{{ '<image>' }}
            {% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}
        {% endfor %}
        {{ '<end_of_utterance>\n' }}
    {% endfor %}
    {% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}
""")


# ── configs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def text(tokenizer: Any, model_type: str, **more: Any) -> dict[str, Any]:
    """The config of a language model."""
    return {
        "model_type": model_type,
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def vision(model_type: str, **more: Any) -> dict[str, Any]:
    """The config of a vision tower of the form of CLIP's."""
    return {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
        "initializer_range": 0.1,
        **more,
    }


def siglip(**more: Any) -> dict[str, Any]:
    return vision("siglip_vision_model", vision_use_head=False, **more)


def rope(section: list[int], **more: Any) -> dict[str, Any]:
    """Rotary positions in time, height and width."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section, **more}}


def experts() -> dict[str, int]:
    return {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def delta_net(tokenizer: Any, model_type: str, **more: Any) -> dict[str, Any]:
    """The language model of Qwen3.5: layers of gated delta nets, then one of full attention."""
    return text(
        tokenizer,
        model_type,
        num_hidden_layers=3,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
        head_dim=16,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        **rope([2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.5),
        **more,
    )


# ── LLaVA ────────────────────────────────────────────────────────────────────────────────────────────────────────────

CLIP_CROP = {**STEPS, **CLIP, "do_center_crop": True, "size": {"shortest_edge": 28}, "crop_size": SQUARE}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]
TILED = {"image_grid_pinpoints": PINPOINTS, "do_pad": True}
LLAMA_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "begins": True}
LLAVA_PATCHES = {
    "image_token": "<image>",
    "patch_size": 7,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}


def llava(tokens: tuple[str, ...]) -> Parts:
    special = ("<s>", "</s>", "<image>", "<pad>", *tokens)
    tokenizer = llama(special, pad_token="<pad>", image_token="<image>", **LLAMA_ROLES)
    config = {
        "text_config": text(tokenizer, "llama"),
        "vision_config": vision("clip_vision_model", num_hidden_layers=3, projection_dim=32),
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "image_seq_length": 16,
        "tie_word_embeddings": False,
    }
    image = {"image_processor_type": "CLIPImageProcessor", **CLIP_CROP}
    processor = {"processor_class": "LlavaProcessor", **LLAVA_PATCHES}
    return Parts("Llava", tokenizer, config, image, processor, LLAVA_CHAT, template_file="chat_template.json")


def llava_next(tokens: tuple[str, ...]) -> Parts:
    special = ("<s>", "</s>", "<image>", "<pad>", *tokens)
    tokenizer = llama(special, pad_token="<pad>", image_token="<image>", **LLAMA_ROLES)
    config = {
        "text_config": text(tokenizer, "mistral", sliding_window=None),
        "vision_config": vision("clip_vision_model", num_hidden_layers=3, projection_dim=32),
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "image_grid_pinpoints": PINPOINTS,
        "image_seq_length": 16,
        "tie_word_embeddings": False,
    }
    image = {"image_processor_type": "LlavaNextImageProcessor", **CLIP_CROP, **TILED, "aspect_ratio_setting": "anyres"}
    processor = {"processor_class": "LlavaNextProcessor", **LLAVA_PATCHES}
    return Parts("LlavaNext", tokenizer, config, image, processor, LLAVA_NEXT_CHAT, template_file="chat_template.json")


def llava_onevision(tokens: tuple[str, ...]) -> Parts:
    named = {"image_token": "<image>", "video_token": "<video>"}
    special = (*CHATML, *named.values(), *tokens)
    tokenizer = byte_level(QWEN_WORDS, special, eos_token="<|im_end|>", pad_token="<|endoftext|>", **named)
    pinpoints = [[height, width] for height in (28, 56, 84) for width in (28, 56, 84)]
    config = {
        "text_config": text(tokenizer, "qwen2"),
        "vision_config": siglip(),
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "video_token_index": tokenizer.convert_tokens_to_ids("<video>"),
        "image_grid_pinpoints": pinpoints,
    }
    image = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        **STEPS,
        **HALF,
        "do_pad": True,
        "size": SQUARE,
        "image_grid_pinpoints": pinpoints,
    }
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        **named,
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
    }
    video = {"video_processor_type": "LlavaOnevisionVideoProcessor", **STEPS, **HALF, "size": SQUARE}
    return Parts(
        "LlavaOnevision",
        tokenizer,
        config,
        image,
        processor,
        LLAVA_ONEVISION_CHAT,
        video=video,
        template_file="chat_template.json",
    )


def granite4_vision(tokens: tuple[str, ...]) -> Parts:
    special = ("<|end_of_text|>", "<|pad|>", "<|start_of_role|>", "<|end_of_role|>", "<image>", *tokens)
    roles = {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|pad|>"}
    tokenizer = byte_level(LLAMA3_WORDS, special, image_token="<image>", **roles)
    scales = {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.5,
        "logits_scaling": 2.0,
    }
    halved = {"vision_feature_select_strategy": "full", "downsample_rate": "2/4"}
    config = {
        "text_config": text(tokenizer, "granite4_vision_text", **scales),
        "vision_config": siglip(hidden_size=64),  # its Q-Former has heads of 64
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "num_hidden_layers": 1,
            "intermediate_size": 48,
            "cross_attention_frequency": 1,
            "max_position_embeddings": 64,
            "use_qformer_text_input": False,
            "initializer_range": 0.1,
        },
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "image_grid_pinpoints": PINPOINTS,
        "image_seq_length": 4,
        "vision_feature_layer": -1,
        **halved,
        "deepstack_layer_map": [[-1, 0]],
        "spatial_vision_layer": -1,
        "spatial_target_layers": [1],
    }
    image = {"image_processor_type": "LlavaNextImageProcessor", **CLIP_CROP, **TILED}
    processor = {
        "processor_class": "Granite4VisionProcessor",
        "image_token": "<image>",
        "patch_size": 7,
        "num_additional_image_tokens": 0,
        **halved,
    }
    return Parts("Granite4Vision", tokenizer, config, image, processor, GRANITE4_CHAT)


# ── Idefics ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def smolvlm(tokens: tuple[str, ...]) -> Parts:
    tokenizer = smolvlm_tokenizer(tokens)
    config = {
        "text_config": text(tokenizer, "llama"),
        "vision_config": vision("smolvlm_vision"),
        "scale_factor": 2,
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
    }
    sizes = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
    image = {
        "image_processor_type": "SmolVLMImageProcessor",
        **STEPS,
        **HALF,
        **sizes,
        "do_pad": True,
        "do_image_splitting": True,
    }
    return Parts(
        "SmolVLM",
        tokenizer,
        config,
        image,
        {"processor_class": "SmolVLMProcessor", "image_seq_len": 4},
        SMOLVLM_CHAT_TEMPLATE,
        video={"video_processor_type": "SmolVLMVideoProcessor", **sizes},
        template_file="chat_template.json",
    )


def idefics2(tokens: tuple[str, ...], window: int | None = None) -> Parts:
    special = ("<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>", *tokens)
    tokenizer = llama(special, pad_token="</s>", **LLAMA_ROLES)
    config = {
        "text_config": text(tokenizer, "mistral", sliding_window=window),
        "vision_config": vision("idefics2_vision", image_size=56),
        "perceiver_config": {
            "model_type": "idefics2_perceiver",
            "hidden_size": WIDTH,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1,
            "initializer_range": 0.1,
        },
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
    }
    image = {
        "image_processor_type": "Idefics2ImageProcessor",
        **STEPS,
        **HALF,
        "do_pad": True,
        "do_image_splitting": False,
        "size": {"longest_edge": 56, "shortest_edge": 28},
    }
    processor = {"processor_class": "Idefics2Processor", "image_seq_len": 4}
    return Parts("Idefics2", tokenizer, config, image, processor, IDEFICS2_CHAT, template_file="chat_template.json")


def idefics2_window(tokens: tuple[str, ...]) -> Parts:
    return idefics2(tokens, window=SLIDING)


# ── Gemma ────────────────────────────────────────────────────────────────────────────────────────────────────────────

GEMMA_ROLES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "begins": True}
ALTERNATING = ["sliding_attention", "full_attention"]


def gemma3(tokens: tuple[str, ...], window: int = 4096) -> Parts:
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    special = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *named.values(), *tokens)
    tokenizer = gemma(special, **GEMMA_ROLES, **named)
    ids = tokenizer.convert_tokens_to_ids
    layers = {"layer_types": ALTERNATING, "sliding_window": window}
    config = {
        "text_config": text(tokenizer, "gemma3_text", head_dim=16, query_pre_attn_scalar=16, **layers),
        "vision_config": siglip(),
        "mm_tokens_per_image": 4,
        "boi_token_index": ids("<start_of_image>"),
        "eoi_token_index": ids("<end_of_image>"),
        "image_token_index": ids("<image_soft_token>"),
        "initializer_range": 0.1,
    }
    image = {
        "image_processor_type": "Gemma3ImageProcessor",
        **STEPS,
        **HALF,
        "do_convert_rgb": None,
        "do_pan_and_scan": None,
        "image_seq_length": 4,
        "size": SQUARE,
    }
    processor = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
    return Parts("Gemma3", tokenizer, config, image, processor, GEMMA3_CHAT, template_file="chat_template.json")


def gemma3_window(tokens: tuple[str, ...]) -> Parts:
    return gemma3(tokens, window=SLIDING)


def gemma4(tokens: tuple[str, ...]) -> Parts:
    named = {
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "video_token": "<|video|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    }
    special = ("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", *named.values(), *tokens)
    tokenizer = gemma(special, **GEMMA_ROLES, **named)
    ids = {role: tokenizer.convert_tokens_to_ids(token) for role, token in named.items()}
    patches = {"patch_size": 4, "pooling_kernel_size": 3}
    config = {
        "text_config": text(
            tokenizer,
            "gemma4_text",
            head_dim=16,
            global_head_dim=16,
            layer_types=ALTERNATING,
            sliding_window=512,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=len(tokenizer),
            use_bidirectional_attention="vision",
        ),
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "initializer_range": 0.1,
            **patches,
        },
        "audio_config": None,
        **{f"{role}_id": ids[role] for role in ids if role != "eoa_token"},
        "eoa_token_index": ids["eoa_token"],
        "initializer_range": 0.1,
    }
    limits = {"max_soft_tokens": 70, **patches}
    image = {"image_processor_type": "Gemma4ImageProcessor", **STEPS, "do_normalize": False, "resample": 3, **limits}
    audio = {"feature_extractor_type": "Gemma4AudioFeatureExtractor"}
    return Parts(
        "Gemma4",
        tokenizer,
        config,
        {**image, "image_seq_length": 70},
        {"processor_class": "Gemma4Processor", "image_seq_length": 70, "feature_extractor": audio},
        GEMMA4_CHAT,
        video={"video_processor_type": "Gemma4VideoProcessor", **limits},
        nested=True,
    )


def paligemma(tokens: tuple[str, ...], template: str | None = None) -> Parts:
    special = ("<pad>", "<eos>", "<bos>", "<image>", *tokens)
    tokenizer = gemma(special, **GEMMA_ROLES, image_token="<image>")
    config = {
        "text_config": text(tokenizer, "gemma", head_dim=16),
        "vision_config": siglip(projection_dim=WIDTH),
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "projection_dim": WIDTH,
        "hidden_size": WIDTH,
    }
    image = {
        "image_processor_type": "SiglipImageProcessor",
        **STEPS,
        **HALF,
        "do_convert_rgb": None,
        "image_seq_length": 16,
        "size": SQUARE,
    }
    processor = {"processor_class": "PaliGemmaProcessor"}
    return Parts("PaliGemma", tokenizer, config, image, processor, template, template_file="tokenizer_config.json")


def paligemma_chat(tokens: tuple[str, ...]) -> Parts:
    """As a fine-tune that has a chat template of its own."""
    return paligemma(tokens, PALIGEMMA_CHAT)


# ── Qwen and GLM ─────────────────────────────────────────────────────────────────────────────────────────────────────

QWEN_NAMED = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
QWEN_PATCHES = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
QWEN_IMAGE = {
    "image_processor_type": "Qwen2VLImageProcessorFast",  # as published, a name from before version 5
    "processor_class": "Qwen3VLProcessor",
    **HALF,
    **QWEN_PATCHES,
    "size": {"shortest_edge": 32 * 32, "longest_edge": 128 * 128},
}
QWEN_VIDEO = {"video_processor_type": "Qwen3VLVideoProcessor", "processor_class": "Qwen3VLProcessor", **QWEN_PATCHES}
QWEN_VISION = {
    "depth": 2,
    "num_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": WIDTH,
    "num_position_embeddings": 64,
    "initializer_range": 0.1,
}


def qwen_tokenizer(special: tuple[str, ...]) -> Any:
    special = (*CHATML, *QWEN_NAMED.values(), "<|vision_pad|>", *special)
    return byte_level(QWEN_WORDS, special, eos_token="<|im_end|>", pad_token="<|endoftext|>", **QWEN_NAMED)


def qwen(
    name: str, tokenizer: Any, language: dict[str, Any], template: str, *, tied: bool = False, **more_vision: Any
) -> Parts:
    ids = tokenizer.convert_tokens_to_ids
    config = {
        "text_config": language,
        "vision_config": {**QWEN_VISION, **more_vision},
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
        "tie_word_embeddings": tied,
    }
    processor = {"processor_class": "Qwen3VLProcessor"}
    return Parts(name, tokenizer, config, QWEN_IMAGE, processor, template, video=QWEN_VIDEO)


def qwen3_5(tokens: tuple[str, ...]) -> Parts:
    tokenizer = qwen_tokenizer(("<think>", "</think>", *tokens))
    return qwen("Qwen3_5", tokenizer, delta_net(tokenizer, "qwen3_5_text"), QWEN3_5_CHAT, tied=True)


def qwen3_5_moe(tokens: tuple[str, ...]) -> Parts:
    tokenizer = qwen_tokenizer(("<think>", "</think>", *tokens))
    language = delta_net(tokenizer, "qwen3_5_moe_text", **experts(), shared_expert_intermediate_size=32)
    return qwen("Qwen3_5Moe", tokenizer, language, QWEN3_5_CHAT)


def qwen3_vl_moe(tokens: tuple[str, ...]) -> Parts:
    tokenizer = qwen_tokenizer(tokens)
    positions = rope([2, 3, 3], mrope_interleaved=True)
    language = text(tokenizer, "qwen3_vl_moe_text", head_dim=16, **experts(), **positions)
    return qwen("Qwen3VLMoe", tokenizer, language, QWEN3_VL_CHAT, deepstack_visual_indexes=[0])


def glm4v(tokens: tuple[str, ...]) -> Parts:
    named = {"image_token": "<|image|>", "video_token": "<|video|>"}
    marks = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
    roles = ("<|system|>", "<|user|>", "<|assistant|>")
    special = ("<|endoftext|>", "[gMASK]", "<sop>", *roles, *marks, *named.values(), *tokens)
    tokenizer = byte_level(LLAMA3_WORDS, special, eos_token="<|endoftext|>", pad_token="<|endoftext|>", **named)
    ids = tokenizer.convert_tokens_to_ids
    patches = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    config = {
        "text_config": text(tokenizer, "glm4v_text", **rope([1, 1, 2], partial_rotary_factor=0.5)),
        "vision_config": {
            "depth": 2,
            "num_heads": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": WIDTH,
            "image_size": 56,
            "initializer_range": 0.1,
        },
        "image_token_id": ids("<|image|>"),
        "video_token_id": ids("<|video|>"),
        "image_start_token_id": ids("<|begin_of_image|>"),
        "image_end_token_id": ids("<|end_of_image|>"),
        "video_start_token_id": ids("<|begin_of_video|>"),
        "video_end_token_id": ids("<|end_of_video|>"),
    }
    size = {"shortest_edge": 2 * 28 * 28, "longest_edge": 2 * 112 * 112}  # of two frames
    image = {"image_processor_type": "Glm4vImageProcessor", **STEPS, **CLIP, **patches, "size": size}
    video = {"video_processor_type": "Glm4vVideoProcessor", **STEPS, **CLIP, **patches, "size": size}
    return Parts("Glm4v", tokenizer, config, image, {"processor_class": "Glm4vProcessor"}, GLM4V_CHAT, video=video)


# ── others ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def internvl(tokens: tuple[str, ...]) -> Parts:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    special = (*CHATML, *named.values(), *tokens)
    tokenizer = byte_level(QWEN_WORDS, special, eos_token="<|im_end|>", pad_token="<|endoftext|>", **named)
    config = {
        "text_config": text(tokenizer, "qwen2"),
        "vision_config": vision("internvl_vision", image_size=[28, 28], patch_size=[7, 7]),
        "image_token_id": tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        "image_seq_length": 4,
    }
    normal = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    return Parts(
        "InternVL",
        tokenizer,
        config,
        {"image_processor_type": "GotOcr2ImageProcessor", **STEPS, **normal, **TILES},
        {"processor_class": "InternVLProcessor", "image_seq_length": 4},
        CHATML_CHAT.replace("IMAGE", r"<IMG_CONTEXT>\n"),
        video={"video_processor_type": "InternVLVideoProcessor", **STEPS, **normal, "size": SQUARE},
    )


def lfm2_vl(tokens: tuple[str, ...]) -> Parts:
    named = {
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail": "<|img_thumbnail|>",
    }
    places = (f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5))
    special = ("<|pad|>", "<|startoftext|>", *CHATML, *named.values(), *places, *tokens)
    roles = {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>", "begins": True}
    tokenizer = byte_level(LLAMA3_WORDS, special, **roles, **named)
    layers = ["conv", "conv", "full_attention"]
    feed_forward = {"block_auto_adjust_ff_dim": False, "block_multiple_of": 16}
    config = {
        "text_config": text(tokenizer, "lfm2", num_hidden_layers=3, layer_types=layers, **feed_forward),
        "vision_config": {
            "model_type": "siglip2_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_patches": 16,
            "patch_size": 7,
            "vision_use_head": False,
            "initializer_range": 0.1,
        },
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "projector_hidden_size": 48,
        "downsample_factor": 2,
    }
    image = {
        "image_processor_type": "Lfm2VlImageProcessorFast",
        **STEPS,
        **HALF,
        "size": SQUARE,
        "downsample_factor": 2,
        "do_image_splitting": True,
        "tile_size": 28,
        "min_tiles": 2,
        "max_tiles": 4,
        "use_thumbnail": True,
        "min_image_tokens": 4,
        "max_image_tokens": 16,
        "max_num_patches": 64,
        "encoder_patch_size": 7,
        "max_pixels_tolerance": 2.0,
    }
    template = "{{ bos_token }}" + CHATML_CHAT.replace("IMAGE", "<image>")
    return Parts("Lfm2Vl", tokenizer, config, image, {"processor_class": "Lfm2VlProcessor"}, template)


def mistral3(tokens: tuple[str, ...]) -> Parts:
    named = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    marks = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    special = ("<unk>", "<s>", "</s>", "<pad>", *marks, *named.values(), *tokens)
    tokenizer = byte_level(QWEN_WORDS, special, pad_token="<pad>", **LLAMA_ROLES, **named)
    config = {
        "text_config": text(tokenizer, "mistral", head_dim=16, sliding_window=None),
        "vision_config": vision("pixtral", image_size=112, patch_size=14),
        "image_token_index": tokenizer.convert_tokens_to_ids("[IMG]"),
        "spatial_merge_size": 2,
        "tie_word_embeddings": False,
    }
    sizes = {"patch_size": {"height": 14, "width": 14}, "size": {"longest_edge": 112}}
    image = {"image_processor_type": "PixtralImageProcessor", **STEPS, **CLIP, **sizes}
    processor = {"processor_class": "PixtralProcessor", **named, "patch_size": 14, "spatial_merge_size": 2}
    return Parts("Mistral3", tokenizer, config, image, processor, MISTRAL3_CHAT)


def aya_vision(tokens: tuple[str, ...]) -> Parts:
    turns = ("<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>")
    roles = ("<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
    marks = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>")
    tiles = ("TILE_GLOBAL", *(f"TILE_{number}" for number in range(1, 5)))
    special = ("<PAD>", "<BOS_TOKEN>", *turns, *roles, "<image>", *marks, *tiles, *tokens)
    ends = {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "pad_token": "<PAD>", "begins": True}
    tokenizer = byte_level(GPT2_WORDS, special, **ends)
    config = {
        "text_config": text(tokenizer, "cohere2", head_dim=16, sliding_window=4096, layer_types=ALTERNATING),
        "vision_config": siglip(),
        "image_token_index": tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
        "downsample_factor": 2,
    }
    image = {"image_processor_type": "GotOcr2ImageProcessor", **STEPS, **HALF, **TILES}
    sizes = {"patch_size": 14, "img_size": 28, "downsample_factor": 1}  # two patches of the tower a side, as published
    processor = {"processor_class": "AyaVisionProcessor", "image_token": "<image>", **sizes}
    return Parts("AyaVision", tokenizer, config, image, processor, AYA_CHAT, template_file="tokenizer_config.json")


def ovis2(tokens: tuple[str, ...]) -> Parts:
    indicators = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    special = (*CHATML, "<image>", "<IMG_ATOM>", *indicators, *tokens)
    tokenizer = byte_level(QWEN_WORDS, special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    visual = {"vocab_size": 64, "hidden_stride": 2, "num_visual_indicator_tokens": len(indicators)}
    config = {
        "text_config": text(tokenizer, "qwen2"),
        "vision_config": {**vision("ovis2_vision"), **visual},
        "image_token_id": tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        "visual_indicator_token_ids": tokenizer.convert_tokens_to_ids(list(indicators)),
        "hidden_size": WIDTH,
        "vocab_size": len(tokenizer),
    }
    image = {"image_processor_type": "Ovis2ImageProcessor", **STEPS, **CLIP, **TILES, "use_covering_area_grid": True}
    processor = {"processor_class": "Ovis2Processor", "image_token": "<image>", "image_seq_length": 4}
    return Parts("Ovis2", tokenizer, config, image, processor, CHATML_CHAT.replace("IMAGE", r"<image>\n"))


def minicpmv4_6(tokens: tuple[str, ...]) -> Parts:
    named = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    }
    special = (*CHATML, *named.values(), *tokens)
    tokenizer = byte_level(QWEN_WORDS, special, eos_token="<|im_end|>", pad_token="<|endoftext|>", **named)
    config = {
        "text_config": delta_net(tokenizer, "qwen3_5_text"),
        "vision_config": vision("minicpmv4_6_vision", image_size=112, patch_size=14),
        "insert_layer_id": 0,
        "image_size": 112,
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    }
    slices = {"slice_mode": True, "max_slice_nums": 4, "scale_resolution": 112, "patch_size": 14}
    image = {"image_processor_type": "MiniCPMV4_6ImageProcessor", **STEPS, **HALF, **slices, "use_image_id": True}
    return Parts(
        "MiniCPMV4_6",
        tokenizer,
        config,
        {**image, "downsample_mode": "16x"},
        {"processor_class": "MiniCPMV4_6Processor"},
        CHATML_CHAT.replace("IMAGE", "<|image_pad|>"),
        video={"video_processor_type": "MiniCPMV4_6VideoProcessor", **STEPS, **HALF, **slices},
    )


FAMILIES: dict[str, Family] = {
    "llava": Family(llava),
    "llava_next": Family(llava_next),
    "llava_onevision": Family(llava_onevision, whole=True),
    "granite4_vision": Family(granite4_vision),
    "smolvlm": Family(smolvlm, whole=True, packages=("num2words",)),
    "idefics2": Family(idefics2),
    "idefics2_window": Family(idefics2_window),
    "gemma3": Family(gemma3),
    "gemma3_window": Family(gemma3_window),
    "gemma4": Family(gemma4, whole=True),
    "paligemma": Family(paligemma),
    "paligemma_chat": Family(paligemma_chat),
    "qwen3_5": Family(qwen3_5, whole=True),
    "qwen3_5_moe": Family(qwen3_5_moe, whole=True),
    "qwen3_vl_moe": Family(qwen3_vl_moe, whole=True),
    "glm4v": Family(glm4v, whole=True),
    "internvl": Family(internvl, whole=True),
    "lfm2_vl": Family(lfm2_vl, torchvision=True, whole=True),
    "mistral3": Family(mistral3, whole=True),
    "aya_vision": Family(aya_vision),
    "ovis2": Family(ovis2),
    "minicpmv4_6": Family(minicpmv4_6, whole=True),
}

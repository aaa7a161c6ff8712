"""Models of transformers and peft, with random weights, against plain backward passes; skipped where they are not."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gpntk

with warnings.catch_warnings():
    # What these packages say of each other while they are imported.
    warnings.simplefilter("ignore")
    transformers: Any = pytest.importorskip("transformers")

WORDS, ROWS, LENGTH = 50, 12, 7
SMALL = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
# Theirs, not ours.
pytestmark = pytest.mark.filterwarnings("ignore")


def batch() -> Any:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, WORDS, (ROWS, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (ROWS, 1), generator=generator)).long()
    return transformers.BatchEncoding({"input_ids": ids * mask, "attention_mask": mask})


def images() -> Tensor:
    return torch.randn(ROWS, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=2))


def distilbert() -> nn.Module:
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 32}
    config = transformers.DistilBertConfig(vocab_size=WORDS, **sizes)
    return transformers.DistilBertForSequenceClassification(config)


def gpt2() -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    config = transformers.GPT2Config(vocab_size=WORDS, pad_token_id=0, bos_token_id=1, eos_token_id=1, **sizes)
    return transformers.GPT2ForSequenceClassification(config)


def adapted(dora: bool) -> nn.Module:
    peft: Any = pytest.importorskip("peft")
    options = {"target_modules": ["c_attn"], "init_lora_weights": False, "fan_in_fan_out": True}
    return peft.get_peft_model(gpt2(), peft.LoraConfig(r=2, task_type="SEQ_CLS", use_dora=dora, **options))


def vit() -> nn.Module:
    sizes = {name: SMALL[name] for name in SMALL if name not in ("vocab_size", "max_position_embeddings")}
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **sizes))


def mamba() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "expand": 2}
    return transformers.MambaModel(transformers.MambaConfig(vocab_size=WORDS, **sizes))


CASES: dict[str, Any] = {
    "bert": (bert, batch, None, None),
    "distilbert": (distilbert, batch, None, None),
    "gpt2": (gpt2, batch, None, None),
    "lora": (lambda: adapted(dora=False), batch, None, "*lora*"),
    "dora": (lambda: adapted(dora=True), batch, None, "*lora*"),
    "vit": (vit, images, None, None),
    "mamba": (mamba, lambda: {"input_ids": batch()["input_ids"]}, "mean", None),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_those_of_plain_backward_passes(name: str) -> None:
    torch.manual_seed(0)
    make, inputs, extract, parameters = CASES[name]
    module, x = make().double().eval().requires_grad_(), inputs()
    x = x[:3].double() if isinstance(x, Tensor) else {key: value[:3] for key, value in x.items()}
    returned = module(x) if isinstance(x, Tensor) else module(**x)
    outputs = returned.logits if extract is None else returned.last_hidden_state.mean(1)
    weights = [weight for key, weight in module.named_parameters() if parameters is None or "lora" in key]
    kept: dict[str, Any] = {"retain_graph": True, "materialize_grads": True, "allow_unused": True}
    rows = [torch.autograd.grad(one, weights, **kept) for one in outputs.flatten()]
    j = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    frozen = gpntk.freeze(module, parameters, extract=extract, inputs=x)
    found = gpntk.NTKKernel(frozen)(frozen.adapter.pack(x, torch.float64)).to_dense()
    assert (found - j @ j.T).abs().max() < 1e-9 * (j @ j.T).abs().max()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("classes", [2, 3])
def test_estimators_take_what_a_tokenizer_gives(name: str, classes: int) -> None:
    torch.manual_seed(0)
    make, inputs, extract, parameters = CASES[name]
    options: dict[str, Any] = {"extract": extract, "parameters": parameters, "kernel": "ntk"}
    options["new_head"] = classes == 3 or extract is not None
    model = gpntk.TransferClassifier(make().eval(), hyperparameters="maximum", **options)
    model.fit(inputs(), np.arange(ROWS) % classes)
    assert model.predict_proba(inputs()).shape == (ROWS, classes)

"""The families of models that Hugging Face's form describes: a table for each, the code once.

Start with `Family`, then FAMILIES. A family says which fields of config.json mean which of ours
(`read_config`, `hf_config`) and which tensors make a parameter (`tensor_shapes`, `cut`).
pretrained.py finds the files and moves the numbers. No JAX in here.

A *path* is our dotted name of a parameter, the layers stacked: h.attn.c_attn.kernel. A *name* is
Hugging Face's name of a tensor, of one layer: h.0.attn.c_attn.weight. Shapes: C n_embd, H heads, KV
heads of keys and values, G = H / KV, D width of a head.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from config import GPTConfig
from errors import UserError, require
from formats.parameters import RopeScaling, parameter_shapes

HFConfig = dict[str, Any]  # the content of a config.json


class Family(NamedTuple):
    """How models of one model_type are written down in Hugging Face's form."""

    architecture: str
    """The class of transformers that loads them."""
    choices: dict[str, Any]
    """Fields of GPTConfig that are the same in all of them."""
    sizes: dict[str, str]
    """Sizes of GPTConfig, and the fields of config.json that must hold them."""
    optional_sizes: dict[str, str]
    """Sizes that config.json may leave out, or leave null; then they have our default."""
    activation: tuple[str, str]
    """The field with the MLP's activation, and what it is if the field is missing."""
    epsilon: tuple[str, float]
    """The field with the epsilon of the norms, and what it is if the field is missing."""
    tied_head: bool
    """What tie_word_embeddings is if the field is missing."""
    biases: tuple[str, ...]
    """The fields that say whether there are biases; all must say the same. None: as choices say."""
    dropouts: tuple[str, ...]
    """The fields that get our dropout."""
    fixed: dict[str, Any]
    """Fields that GPTConfig cannot express: the one value that is implemented, or a missing one."""
    prefix: str
    """What the names of all tensors but the head's begin with; files of the bare model lack it."""
    modules: dict[str, tuple[str, ...]]
    """Our modules, and theirs that make one: {} is the number of the layer. Three are q, k, v."""
    kernels_transposed: bool
    """Whether a matrix is (out, in), as torch's Linear has it."""


GPT2 = Family(
    architecture="GPT2LMHeadModel",
    choices={"bias": True},
    sizes={
        "block_size": "n_positions",
        "vocab_size": "vocab_size",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
    },
    optional_sizes={"mlp_width": "n_inner"},
    activation=("activation_function", "gelu_new"),
    epsilon=("layer_norm_epsilon", 1e-5),
    tied_head=True,
    biases=(),
    dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    fixed={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    prefix="transformer.",
    modules={
        "wte": ("wte",),
        "wpe": ("wpe",),
        "h.ln_1": ("h.{}.ln_1",),
        "h.attn.c_attn": ("h.{}.attn.c_attn",),
        "h.attn.c_proj": ("h.{}.attn.c_proj",),
        "h.ln_2": ("h.{}.ln_2",),
        "h.mlp.c_fc": ("h.{}.mlp.c_fc",),
        "h.mlp.c_proj": ("h.{}.mlp.c_proj",),
        "ln_f": ("ln_f",),
        "lm_head": ("lm_head",),
    },
    kernels_transposed=False,
)

LLAMA = Family(
    architecture="LlamaForCausalLM",
    choices={"norm": "rmsnorm", "positions": "rotary", "mlp": "gated", "bias": False},
    sizes={
        "block_size": "max_position_embeddings",
        "vocab_size": "vocab_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
        "mlp_width": "intermediate_size",
    },
    optional_sizes={"n_kv_head": "num_key_value_heads", "head_size": "head_dim"},
    activation=("hidden_act", "silu"),
    epsilon=("rms_norm_eps", 1e-6),
    tied_head=False,
    biases=("attention_bias", "mlp_bias"),
    dropouts=("attention_dropout",),
    fixed={"sliding_window": None},
    prefix="model.",
    modules={
        "wte": ("embed_tokens",),
        "h.ln_1": ("layers.{}.input_layernorm",),
        "h.attn.c_attn": (
            "layers.{}.self_attn.q_proj",
            "layers.{}.self_attn.k_proj",
            "layers.{}.self_attn.v_proj",
        ),
        "h.attn.q_norm": ("layers.{}.self_attn.q_norm",),
        "h.attn.k_norm": ("layers.{}.self_attn.k_norm",),
        "h.attn.c_proj": ("layers.{}.self_attn.o_proj",),
        "h.ln_2": ("layers.{}.post_attention_layernorm",),
        "h.mlp.c_gate": ("layers.{}.mlp.gate_proj",),
        "h.mlp.c_fc": ("layers.{}.mlp.up_proj",),
        "h.mlp.c_proj": ("layers.{}.mlp.down_proj",),
        "ln_f": ("norm",),
        "lm_head": ("lm_head",),
    },
    kernels_transposed=True,
)

QWEN2 = LLAMA._replace(
    architecture="Qwen2ForCausalLM",
    choices={**LLAMA.choices, "qkv_bias": True},
    sizes={**LLAMA.sizes, "n_kv_head": "num_key_value_heads"},
    optional_sizes={"head_size": "head_dim"},
    biases=(),
    fixed={"use_sliding_window": False},
)

QWEN3 = LLAMA._replace(
    architecture="Qwen3ForCausalLM",
    choices={**LLAMA.choices, "qk_norm": True},
    sizes={**LLAMA.sizes, "n_kv_head": "num_key_value_heads", "head_size": "head_dim"},
    optional_sizes={},
    biases=(),
    fixed={"use_sliding_window": False, "attention_bias": False},
)

FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}
"""The families by the model_type of config.json. In export the first that fits is taken."""

FIXED = {
    "quantization_config": None,
    "num_experts": None,
    "num_local_experts": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
"""Like Family.fixed, of all families: what a variant of one may have and we do not do."""

ACTIVATIONS = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
"""The activations by Hugging Face's names, of which some have two."""

TENSOR_OF = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
"""Our names of what a module holds, and torch's."""

NOT_STORED = ("dropout", "vocab_multiple", "dtype", "training_attention", "remat", "scan_unroll")
"""The fields of GPTConfig that say how a model is computed, not what it is."""

HEAD = "lm_head.weight"
"""Name of the head's tensor, which is there once more where it is tied."""


# config.json


def read_config(hf: HFConfig, label: str) -> tuple[Family, GPTConfig]:
    """Return the family and the config of a model that the content of config.json describes.

    Raises UserError, naming the field, for what is not implemented; label stands before."""
    model_type = hf.get("model_type")
    require(
        model_type in FAMILIES,
        f"{label}: model_type={model_type!r} is not implemented, only {', '.join(FAMILIES)}",
    )
    family = FAMILIES[str(model_type)]
    require_fixed_fields(family, hf, label)
    fields = {
        **family.choices,
        **read_sizes(family, hf, label),
        "activation": read_activation(family, hf, label),
        "layer_norm_epsilon": read_epsilon(family, hf, label),
        "tied_head": read_flag("tie_word_embeddings", family.tied_head, hf, label),
    }
    if family.biases:
        fields["bias"] = read_biases(family, hf, label)
    if family.choices.get("positions") == "rotary":
        fields |= read_rope(hf, label)
    try:
        return family, as_defaults(GPTConfig(**fields))
    except UserError as error:
        raise UserError(f"{label}: {error}", error.param) from error


def require_fixed_fields(family: Family, hf: HFConfig, label: str) -> None:
    """Raise UserError unless the fields that GPTConfig cannot express say what is implemented."""
    for field, implemented in {**FIXED, **family.fixed}.items():
        value = hf.get(field, implemented)
        require(
            value == implemented,
            f"{label}: {field}={value!r} is not implemented, only {implemented!r}",
        )
    layer_types = hf.get("layer_types") or ()
    others = [kind for kind in layer_types if kind != "full_attention"]
    require(
        not others,
        f"{label}: layer_types with {others[:1]} are not implemented, only full_attention",
    )


def read_sizes(family: Family, hf: HFConfig, label: str) -> dict[str, Any]:
    """Return the sizes in config.json by our names."""
    sizes = {}
    for ours, theirs in (family.sizes | family.optional_sizes).items():
        n = hf.get(theirs)
        if n is None and ours in family.optional_sizes:
            continue
        require(
            type(n) is int and n > 0,  # not isinstance: true is an int to Python
            f"{label}: {theirs}={n!r} must be a whole number of at least 1",
        )
        sizes[ours] = n
    return sizes


def read_activation(family: Family, hf: HFConfig, label: str) -> str:
    """Return the MLP's activation by our name."""
    field, default = family.activation
    value = hf.get(field, default)
    require(
        value in ACTIVATIONS,
        f"{label}: {field}={value!r} is not implemented, only {', '.join(ACTIVATIONS)}",
    )
    return ACTIVATIONS[value]


def read_epsilon(family: Family, hf: HFConfig, label: str) -> float:
    """Return what is added to the variance in the norms."""
    field, default = family.epsilon
    epsilon = hf.get(field, default)
    require(
        type(epsilon) is float and 0 < epsilon < 1,
        f"{label}: {field}={epsilon!r} is not in (0, 1)",
    )
    return epsilon


def read_flag(field: str, default: bool, hf: HFConfig, label: str) -> bool:
    """Return a field that is true or false."""
    value = hf.get(field, default)
    require(type(value) is bool, f"{label}: {field}={value!r} must be true or false")
    return value


def read_biases(family: Family, hf: HFConfig, label: str) -> bool:
    """Return whether the matrices have biases: all of a block, or none."""
    values = {field: read_flag(field, False, hf, label) for field in family.biases}
    said = " with ".join(f"{field}={value}" for field, value in values.items())
    require(len(set(values.values())) == 1, f"{label}: {said} is not implemented, only the same")
    return any(values.values())


def read_rope(hf: HFConfig, label: str) -> dict[str, Any]:
    """Return rope_theta and rope_scaling.

    transformers 5 writes rope_parameters with all of it, older ones rope_theta and rope_scaling."""
    parameters: Any = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    require(isinstance(parameters, dict), f"{label}: rope_parameters={parameters!r} is no object")
    by_layer = [name for name, value in parameters.items() if isinstance(value, dict)]
    require(not by_layer, f"{label}: rope_parameters of {by_layer[:1]} alone are not implemented")
    theta = parameters.get("rope_theta", hf.get("rope_theta", GPTConfig.rope_theta))
    is_number = type(theta) in (int, float)  # true is an int to Python
    require(is_number, f"{label}: rope_theta={theta!r} must be a number")
    for where in (hf, parameters):
        partial = where.get("partial_rotary_factor", 1.0)
        require(
            partial in (None, 1.0),
            f"{label}: partial_rotary_factor={partial!r} is not implemented, only 1.0",
        )
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    require(
        kind in ("default", "llama3"),
        f"{label}: rope_type={kind!r} is not implemented, only default and llama3",
    )
    scaling = read_llama3_scaling(parameters, hf, label) if kind == "llama3" else None
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def read_llama3_scaling(parameters: dict[str, Any], hf: HFConfig, label: str) -> RopeScaling:
    """Return Llama 3's scaling of rotary positions."""
    known = {"original_max_position_embeddings": hf.get("max_position_embeddings"), **parameters}
    values = {field.name: known.get(field.name) for field in dataclasses.fields(RopeScaling)}
    for name, value in values.items():
        require(
            type(value) in (int, float),
            f"{label}: {name}={value!r} of rope_type=llama3 must be a number",
        )
    return RopeScaling(**values)  # type: ignore[arg-type]  # they are numbers


def as_defaults(config: GPTConfig) -> GPTConfig:
    """Return the same model, with None in place of what None means."""
    changes: dict[str, Any] = {}
    if config.n_kv_head == config.n_head:
        changes["n_kv_head"] = None
    if config.head_dim * config.n_head == config.n_embd:
        changes["head_size"] = None
    if config.mlp_width == 4 * config.n_embd:
        changes["mlp_width"] = None
    if config.qkv_bias == config.bias:
        changes["qkv_bias"] = None
    return dataclasses.replace(config, **changes)


def hf_config(model_type: str, config: GPTConfig) -> HFConfig:
    """Return what config.json says about the model, the special tokens left out."""
    family = FAMILIES[model_type]
    sizes = {
        theirs: getattr(config, "kv_heads" if ours == "n_kv_head" else ours)
        for ours, theirs in (family.sizes | family.optional_sizes).items()
    }
    if "mlp_width" in family.sizes:
        sizes[family.sizes["mlp_width"]] = config.mlp_dim
    if family.choices.get("positions") == "rotary":
        sizes["head_dim"] = config.head_dim
        sizes |= hf_rope(config)
    return {
        "architectures": [family.architecture],
        "model_type": model_type,
        "torch_dtype": "float32",
        **sizes,
        **family.fixed,
        family.activation[0]: config.activation,
        family.epsilon[0]: config.layer_norm_epsilon,
        "tie_word_embeddings": config.tied_head,
        **dict.fromkeys(family.biases, config.bias),
        **dict.fromkeys(family.dropouts, config.dropout),
    }


def hf_rope(config: GPTConfig) -> dict[str, Any]:
    """Return the fields about rotary positions, for transformers 5 and for older readers."""
    scaling = None
    if config.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)}
    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": parameters,
    }


def family_of(config: GPTConfig) -> tuple[str, GPTConfig]:
    """Return the model_type to write a model as, and its config as one of that family has it.

    Raises UserError, saying what does not fit the nearest, if none fits."""
    nearest: list[str] = []
    for model_type, family in FAMILIES.items():
        wanted = as_defaults(with_biases(family, config))
        problems = what_does_not_fit(model_type, wanted)
        if not problems:
            return model_type, wanted
        if not nearest or len(problems) <= len(nearest):
            nearest = problems
    raise UserError(
        f"no family of Hugging Face's has such a model ({', '.join(FAMILIES)}), so it cannot be "
        f"exported: {'; '.join(nearest)}"
    )


def what_does_not_fit(model_type: str, config: GPTConfig) -> list[str]:
    """Return, for a sentence, what of a model is not read back as it was if it is so written."""
    try:
        _, back = read_config(hf_config(model_type, config), model_type)
    except UserError as error:
        return [str(error)]
    problems = [
        f"{model_type} has {name}={getattr(back, name)}, and the model {getattr(config, name)}"
        for name in sorted(vars(config))
        if name not in NOT_STORED and getattr(back, name) != getattr(config, name)
    ]
    if model_type == "llama" and config.n_embd % config.n_head > 0:
        problems.append(
            f"llama wants n_embd={config.n_embd} to be divisible by n_head={config.n_head}"
        )
    return problems


def with_biases(family: Family, config: GPTConfig) -> GPTConfig:
    """Return config with biases everywhere if the family always has them, else as it is.

    Those that the model has not are then written as zeros."""
    if family.biases or not family.choices["bias"]:
        return config
    return dataclasses.replace(config, bias=True, qkv_bias=None)


# Tensors


def names_of(family: Family, path: str, layer: int) -> list[str]:
    """Return the names of the tensors that make one layer of a parameter, without the prefix.

    wte.embedding -> [wte.weight]; h.ln_1.scale, 1 -> [h.1.ln_1.weight]."""
    module, _, leaf = path.rpartition(".")
    return [f"{theirs.format(layer)}.{TENSOR_OF[leaf]}" for theirs in family.modules[module]]


def layers_of(path: str, config: GPTConfig) -> range:
    """Return the numbers of the layers of a parameter; those outside of the blocks have one."""
    return range(config.n_layer if path.startswith("h.") else 1)


def cut(family: Family, path: str, layer: np.ndarray, config: GPTConfig) -> list[np.ndarray]:
    """Return views of one layer of a parameter, one for each of its tensors.

    What a tensor holds, once a transposed kernel is (in, out), has the numbers of its view in the
    view's order. q is (..., KV, G, D), for head h = kv G + g: see CausalSelfAttention."""
    module = path.rpartition(".")[0]
    if len(family.modules[module]) == 1:
        return [layer]
    G = config.qkv_parts - 2
    parts = layer.reshape(*layer.shape[:-1], G + 2, config.kv_heads, config.head_dim)
    return [parts[..., :G, :, :].swapaxes(-3, -2), parts[..., G, :, :], parts[..., G + 1, :, :]]


def tensor_shapes(family: Family, config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Return the names of all tensors, without the prefix, with their shapes.

    A head that is tied is not among them."""
    queries = config.n_head * config.head_dim
    keys = config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    for path, (*inputs, width) in parameter_shapes(config).items():
        joined = len(family.modules[path.rpartition(".")[0]]) > 1
        parts = [(*inputs, part) for part in ((queries, keys, keys) if joined else (width,))]
        if family.kernels_transposed and path.endswith("kernel"):
            parts = [part[::-1] for part in parts]
        for layer in layers_of(path, config):
            shapes.update(zip(names_of(family, path, layer), parts, strict=True))
    return shapes

"""A model's parameters, from its config alone: their names, shapes and kinds, how many there are."""

from __future__ import annotations

import math

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import fail, field_problem, flag
from megalith.config.parameter_kinds import ADAPTERS, OUTPUT_LAYER, ParameterKind, pattern_of, tower_name
from megalith.config.sections.model import ModelConfig

Shapes = dict[str, tuple[int, ...]]
CONSTANT = {"zeros": 0.0, "ones": 1.0}


def sizes(model: ModelConfig) -> tuple[int, int, int, int]:
    """(layers, hidden size, query heads, true vocabulary size). Raises ConfigError where one is not known."""
    names = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")
    layers, hidden, heads, vocabulary = (getattr(model, name) for name in names)
    rule = "must be given, because the size of a model depends on it"
    unknown = [name for name in names if getattr(model, name) is None]
    fail(field_problem((name,), flag(name), None, rule, f"Write {flag(name)} N").text for name in unknown)
    return layers, hidden, heads, vocabulary


def matrix_parameters(model: ModelConfig) -> int:
    """Elements of the weight matrices that each token is multiplied with: all layers, the output layer, no biases."""
    shapes = parameter_shapes(model)
    matrices = sum(math.prod(shape) for name, shape in shapes.items() if parameter_kind(model, name).multiplies)
    return matrices + (math.prod(shapes["embedding.weight"]) if tied_output(model) else 0)


def has_output_layer(model: ModelConfig) -> bool:
    """Whether there is an output layer over the vocabulary."""
    return any(kind.name == OUTPUT_LAYER.name for kind in model.architecture.find("kinds").values())


def tied_output(model: ModelConfig) -> bool:
    """Whether there is an output layer over the vocabulary that has the embedding's weight."""
    return has_output_layer(model) and not model.untie_embeddings_and_output_weights


def attention_parameters(model: ModelConfig) -> int:
    """Elements of the weight matrices of an attention."""
    _, h, heads, _ = sizes(model)
    return 2 * h * model.head_dim * (heads + model.num_kv_heads)  # q and out; k and v


def mlp_parameters(model: ModelConfig) -> int:
    """Elements of the weight matrices of an MLP."""
    return (3 if model.gated else 2) * sizes(model)[1] * model.ffn_size


def parameter_count(model: ModelConfig) -> int:
    """Number of parameters, each shared one once, at the true vocabulary size. Needs vocab_size."""
    return sum(math.prod(shape) for shape in parameter_shapes(model).values())


def parameter_shapes(model: ModelConfig) -> Shapes:
    """{parameter: shape}, by the names in a checkpoint (after `model/`); a shared one once. Needs vocab_size."""
    return model.architecture.find("shapes")(model)


def parameter_kind(model: ModelConfig, name: str) -> ParameterKind:
    """What the parameter of this name is. Raises ConfigError where the model's record does not say it."""
    if adapter := next((kind for end, kind in ADAPTERS.items() if name.endswith(end)), None):
        return adapter
    kinds = model.architecture.find("kinds")
    if (pattern := pattern_of(name)) not in kinds:
        rule = f"must be among the kinds of {model.model_type} ({model.architecture.kinds})"
        raise ConfigError(problem("A parameter", name, rule, f"Add {pattern!r} to them"))
    return kinds[pattern]


def weight_decays(model: ModelConfig, name: str, parameter: object = None) -> bool:
    """Whether weight decay applies to the parameter of this name; the value of `parameter` is not used."""
    return parameter_kind(model, name).decays


def initial(model: ModelConfig, name: str) -> tuple[str, float]:
    """How a parameter starts: ("normal", standard deviation), ("xavier", 1.0), ("kaiming", 1.0) or ("constant", value).

    Megatron's rules, by what the parameter is (parameter_kinds.py): matrices from N(0, std), those that write to the
    residual stream from N(0, std / sqrt(2 layers)).
    """
    start, std = parameter_kind(model, name).initial, model.init_method_std
    if start in CONSTANT:
        return "constant", CONSTANT[start]
    if start == "kaiming":
        return "kaiming", 1.0
    if start == "norm":
        return "constant", 0.0 if model.apply_layernorm_1p else 1.0
    if model.init_method_xavier_uniform and start != "embedding":
        return "xavier", 1.0
    return "normal", std / (2.0 * model.num_layers) ** 0.5 if start == "residual" else std


def gpt_shapes(model: ModelConfig) -> Shapes:
    """Shapes of a GPT's parameters (models/gpt.py)."""
    layers, h, heads, vocabulary = sizes(model)
    found: Shapes = {"embedding.weight": (vocabulary, h)}
    if model.positions == "learned_absolute":
        found["position_embedding.weight"] = (model.max_position_embeddings or 0, h)
    if model.embed_layernorm:
        found |= norm_shapes("embedding_norm", model)
    for number in range(layers):
        found |= {f"layers.{number}.{name}": shape for name, shape in layer_shapes(model, heads).items()}
    found |= norm_shapes("final_norm", model)
    if model.untie_embeddings_and_output_weights:
        found["head.weight"] = (vocabulary, h)
    return found


def bert_encoder_shapes(model: ModelConfig) -> Shapes:
    """Shapes of a BERT's parameters without its heads, but with the pooler (models/bert.py: Encoder)."""
    layers, h, heads, vocabulary = sizes(model)
    positions = model.max_position_embeddings or 0
    found: Shapes = {"embedding.weight": (vocabulary, h), "position_embedding.weight": (positions, h)}
    if not model.bert_no_binary_head:
        found |= {"token_type_embedding.weight": (2, h), "pooler.weight": (h, h), "pooler.bias": (h,)}
    for number in range(layers):
        found |= {f"layers.{number}.{name}": shape for name, shape in layer_shapes(model, heads).items()}
    return found | norm_shapes("embedding_norm" if model.norm_after_residual else "final_norm", model)


def bert_shapes(model: ModelConfig) -> Shapes:
    """Shapes of a BERT's parameters (models/bert.py)."""
    _, h, _, vocabulary = sizes(model)
    found = bert_encoder_shapes(model) | norm_shapes("head_norm", model)
    found |= {"head_dense.weight": (h, h), "head_dense.bias": (h,), "head.bias": (vocabulary,)}
    if model.untie_embeddings_and_output_weights:
        found["head.weight"] = (vocabulary, h)
    return found if model.bert_no_binary_head else found | {"order_head.weight": (2, h), "order_head.bias": (2,)}


def bert_classification_shapes(model: ModelConfig) -> Shapes:
    """Shapes of a BERT with a classification head (models/bert_classification.py)."""
    classifier = {"classifier": (model.num_classes, sizes(model)[1], True)}
    return bert_encoder_shapes(model) | linear_shapes(classifier)


def bert_multiple_choice_shapes(model: ModelConfig) -> Shapes:
    """Shapes of a BERT with a multiple-choice head (models/bert_multiple_choice.py)."""
    return bert_encoder_shapes(model) | linear_shapes({"classifier": (1, sizes(model)[1], True)})


def towers(model: ModelConfig) -> tuple[str, ...]:
    """The towers of a bi-encoder; a shared one is called as the query's."""
    return ("query",) if model.biencoder_shared_query_context_model else ("query", "context")


def biencoder_shapes(model: ModelConfig) -> Shapes:
    """Shapes of a bi-encoder's parameters (models/biencoder.py): a BERT without pooler, and a projection, a tower."""
    bert = {name: shape for name, shape in bert_encoder_shapes(model).items() if not name.startswith("pooler.")}
    width, found = model.biencoder_projection_dim, Shapes()
    for tower in towers(model):
        found |= {tower_name(tower, name): shape for name, shape in bert.items()}
        if width:
            found |= linear_shapes({f"{tower}_head.projection": (width, sizes(model)[1], True)})
    return found


def t5_shapes(model: ModelConfig) -> Shapes:
    """Shapes of a T5's parameters (models/t5.py)."""
    layers, _, heads, vocabulary = sizes(model)
    found = gpt_shapes(model) | norm_shapes("encoder_norm", model)
    for number in range(layers, model.all_layers):
        layer = layer_shapes(model, heads) | cross_shapes(model, heads)
        found |= {f"layers.{number}.{name}": shape for name, shape in layer.items()}
    if model.positions == "relative":
        bias = (model.relative_attention_num_buckets, heads)
        found |= {f"{stack}_bias.weight": bias for stack in ("encoder", "decoder")}
    return found | ({"head.bias": (vocabulary,)} if model.add_bias_linear else {})


def retro_shapes(model: ModelConfig) -> Shapes:
    """Shapes of a Retro's parameters (models/retro.py)."""
    heads, found, cross = sizes(model)[2], gpt_shapes(model), cross_shapes(model, sizes(model)[2])
    for number in model.retrieval_layers:
        found |= {
            f"layers.{number}.{name}": shape for name, shape in cross.items() if name != "cross_attention.out.bias"
        }
    for number in model.retrieval_layers[:1]:
        encoder = norm_shapes("norm", model)
        for layer in range(model.retro_encoder_layers):
            of_layer = layer_shapes(model, heads) | ({} if layer else cross)
            encoder |= {f"layers.{layer}.{name}": shape for name, shape in of_layer.items()}
        found |= {f"layers.{number}.encoder.{name}": shape for name, shape in encoder.items()}
    return found


Linears = dict[str, tuple[int, int, bool]]  # module -> outputs, inputs, whether it has a bias


def attention_linears(model: ModelConfig, heads: int) -> Linears:
    """Linear layers of an attention (layers/attention.py)."""
    h, queries, keys = model.hidden_size, heads * model.head_dim, model.num_kv_heads * model.head_dim
    bias, qkv_bias = model.add_bias_linear, model.add_bias_linear or model.add_qkv_bias
    return {
        "attention.q": (queries, h, qkv_bias), "attention.k": (keys, h, qkv_bias), "attention.v": (keys, h, qkv_bias),
        "attention.out": (h, queries, bias),
    }  # fmt: skip


def linear_shapes(linears: Linears) -> Shapes:
    """Shapes of linear layers' parameters."""
    found: Shapes = {}
    for name, (outputs, inputs, biased) in linears.items():
        found |= {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if biased else {})
    return found


def cross_shapes(model: ModelConfig, heads: int) -> Shapes:
    """Shapes of the parameters of a layer's cross attention, with its norm."""
    linears = {f"cross_{name}": each for name, each in attention_linears(model, heads).items()}
    return norm_shapes("cross_norm", model) | linear_shapes(linears)


def layer_shapes(model: ModelConfig, heads: int) -> Shapes:
    """Shapes of the parameters of one transformer layer (layers/block.py)."""
    h, inner, bias = model.hidden_size, model.ffn_size, model.add_bias_linear
    linears = attention_linears(model, heads) | {"mlp.up": (inner, h, bias), "mlp.down": (h, inner, bias)}
    if model.gated:
        linears["mlp.gate"] = (inner, h, bias)
    found = norm_shapes("attention_norm", model) | linear_shapes(linears)
    found |= norm_shapes("mlp_norm", model) if model.two_norms else {}
    if model.qk_layernorm:
        found |= {f"attention.{name}_norm.weight": (model.head_dim,) for name in "qk"}
    return found


def norm_shapes(name: str, model: ModelConfig) -> Shapes:
    """Shapes of the parameters of a norm of the residual stream."""
    kinds = ("weight", "bias") if model.norm == "layernorm" else ("weight",)
    return {f"{name}.{kind}": (model.hidden_size,) for kind in kinds}

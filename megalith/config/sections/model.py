"""The section `model`: what is trained."""

from __future__ import annotations

from megalith.config.architectures import ARCHITECTURES, Architecture, architecture
from megalith.config.options import option, section

GLU_ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh", "reglu", "liglu")
POSITIONS = {"absolute": "learned_absolute", "rotary": "rope"}  # older spelling -> the one used inside


@section
class ModelConfig:
    """Shape and numerics of the model. Sizes are counts; names are Megatron's."""

    model_type: str = option("gpt", "model by registry name, or module:name of your own", names=tuple(ARCHITECTURES))
    num_layers: int | None = option(None, "number of transformer layers", minimum=1)
    decoder_num_layers: int | None = option(
        None, "t5: layers of the decoder; --num-layers are the encoder's (default: as many)", minimum=1
    )
    hidden_size: int | None = option(None, "width of the residual stream", minimum=1)
    num_attention_heads: int | None = option(None, "number of query heads", minimum=1)
    ffn_hidden_size: int | None = option(
        None, "inner width of the MLP (default 4 x hidden; --swiglu: 2/3 of it, a multiple of 64)", minimum=1
    )
    kv_channels: int | None = option(None, "width of one head (default hidden / heads)", minimum=1)
    attention_head_type: str = option(
        "multihead", "multihead, or multiquery: one key/value head", choices=("multihead", "multiquery")
    )
    group_query_attention: bool = option(
        False, "share key/value heads among groups of query heads (with --num-query-groups)"
    )
    num_query_groups: int | None = option(
        None, "number of key/value heads", flags=("--num-key-value-heads",), minimum=1
    )
    max_position_embeddings: int | None = option(None, "longest sequence of the model in tokens", minimum=1)
    position_embedding_type: str = option(
        "learned_absolute",
        "how positions are encoded; relative: T5's learned bias by distance",
        choices=("learned_absolute", "absolute", "rope", "rotary", "alibi", "relative", "none"),
    )
    relative_attention_num_buckets: int = option(32, "t5: distances that the relative bias distinguishes", minimum=4)
    relative_attention_max_distance: int = option(
        128, "t5: tokens from which on the relative bias is the same", minimum=2
    )
    use_rotary_position_embeddings: bool = option(False, "same as --position-embedding-type rope")
    rotary_base: float = option(
        10000.0,
        "theta of the rotary embedding",
        flags=("--rotary-position-embeddings-theta", "--rope-theta"),
        minimum=1.0,
    )
    rotary_percent: float = option(1.0, "fraction of each head that is rotated, 0 to 1", minimum=0.0)
    rotary_interleaved: bool = option(
        False, "rotate neighbouring pairs (GPT-J, Meta's files) instead of halves (NeoX, Hugging Face)"
    )
    rope_scaling_type: str | None = option(
        None, "scale the rotary embedding beyond the length it was trained for", choices=("linear", "llama3", "yarn")
    )
    rope_scaling_factor: float = option(8.0, "how many times longer sequences may be", minimum=1.0)
    rope_original_max_position_embeddings: int = option(
        8192, "llama3, yarn: longest sequence before scaling, in tokens", minimum=1
    )
    rope_low_freq_factor: float = option(
        1.0, "llama3: channels that turn less often than this in that length are scaled in full", minimum=0.0
    )
    rope_high_freq_factor: float = option(
        4.0, "llama3: channels that turn more often than this in that length stay as they are", minimum=0.0
    )
    rope_beta_fast: float = option(
        32.0, "yarn: channels that turn more often than this in that length stay as they are", minimum=0.0
    )
    rope_beta_slow: float = option(
        1.0, "yarn: channels that turn less often than this in that length are scaled in full", minimum=0.0
    )
    scaled_alibi: bool = option(False, "divide ALiBi's biases by the square root of the width of a head (Falcon)")
    sliding_window: int | None = option(
        None, "tokens that each token sees, itself and those before it (default: all)", minimum=1
    )
    full_attention_layers: list[int] = option(
        [], "layers, counted from 0, whose tokens see all before them in spite of --sliding-window"
    )
    embed_layernorm: bool = option(False, "norm the embeddings too (Bloom)")
    parallel_attn: bool = option(
        False, "attention and MLP side by side, both from the residual before either (Falcon, NeoX)"
    )
    parallel_layernorm: bool = option(False, "with --parallel-attn: a norm for each of the two instead of one for both")
    normalization: str = option(
        "LayerNorm", "norm of the residual stream", choices=("LayerNorm", "RMSNorm", "layernorm", "rmsnorm")
    )
    apply_layernorm_1p: bool = option(False, "with RMSNorm: weights of norms are stored minus one (Gemma)")
    scale_embeddings: bool = option(False, "multiply word embeddings by the square root of the hidden size (Gemma)")
    layernorm_epsilon: float = option(1e-5, "added to the variance", flags=("--norm-epsilon",), minimum=0.0)
    apply_residual_connection_post_layernorm: bool = option(
        False, "take the residual after the norm instead of before it (post-LN residual)"
    )
    norm_after_residual: bool = option(
        False, "bert: norm after each residual and after the embeddings, no final norm, as Google's BERT"
    )
    bert_no_binary_head: bool = option(False, "bert: one segment, without the prediction of the order of two")
    num_classes: int = option(2, "bert_classification: number of classes; 1 for a number (regression)", minimum=1)
    classifier_dropout: float | None = option(
        None,
        "dropout before the head of bert_classification and bert_multiple_choice (default: --hidden-dropout)",
        minimum=0.0,
    )
    biencoder_projection_dim: int = option(
        0,
        "ict: width of the vectors of queries and contexts, by a projection (default: none, --hidden-size)",
        flags=("--ict-head-size",),
        minimum=0,
    )
    biencoder_shared_query_context_model: bool = option(False, "ict: one BERT for queries and contexts instead of two")
    openai_gelu: bool = option(False, "GELU by its tanh approximation everywhere, as GPT-2 has it")
    bias_gelu_fusion: bool = option(
        True,
        "GELU of an MLP with biases by its tanh approximation, as Megatron's fused kernel computes it; "
        "--no-...: exact (erf)",
    )
    relu: bool = option(False, "ReLU instead of GELU, as the first T5")
    squared_relu: bool = option(False, "squared ReLU instead of GELU")
    swiglu: bool = option(False, "gated MLP with SiLU: silu(gate) * up")
    glu_activation: str | None = option(None, "gated MLP by name", choices=GLU_ACTIVATIONS)
    add_bias_linear: bool = option(True, "biases in the linear layers", flags=("--disable-bias-linear",))
    add_qkv_bias: bool = option(False, "biases in q, k and v even where the other linear layers have none (Qwen2)")
    qk_layernorm: bool = option(False, "norm each query and key head (Qwen3)")
    untie_embeddings_and_output_weights: bool = option(False, "give the output layer its own weight")
    vocab_size: int | None = option(None, "true vocabulary size (default: the tokenizer's)", minimum=1)
    make_vocab_size_divisible_by: int = option(
        128, "padding that Megatron would add; printed and used on export, never stored here", minimum=1
    )
    retro_layer_numbers: list[int] = option(
        [],
        "retro: layers with chunked cross-attention, counted from 1 (default: Megatron's, every third from 6; from 9 "
        "with more than 15 layers)",
    )
    retro_encoder_layers: int = option(2, "retro: layers of the encoder of neighbours", minimum=1)
    retro_encoder_hidden_dropout: float = option(0.1, "retro: --hidden-dropout of the encoder", minimum=0.0)
    retro_encoder_attention_dropout: float = option(0.1, "retro: --attention-dropout of the encoder", minimum=0.0)
    retro_gpt_chunk_length: int = option(64, "retro: tokens of a chunk of text", minimum=1)
    retro_num_neighbors: int = option(2, "retro: neighbours of each chunk that the model reads", minimum=1)
    retro_num_retrieved_chunks: int = option(
        2, "retro: chunks of a neighbour: itself, and what follows it in its document", minimum=1
    )
    hidden_dropout: float = option(0.1, "dropout of embeddings and of each branch before its residual", minimum=0.0)
    attention_dropout: float = option(0.1, "dropout of attention probabilities", minimum=0.0)
    init_method_std: float = option(0.02, "standard deviation of the initial weights", minimum=0.0)
    initializer_factor: float | None = option(
        None,
        "t5: initial weights by the width of each layer's input, times this (T5's own: 1); default: --init-method-std",
        minimum=0.0,
    )
    init_method_xavier_uniform: bool = option(False, "draw weight matrices from Xavier's uniform distribution instead")
    softmax_scale: float | None = option(
        None, "what attention scores are multiplied by (default: 1 / sqrt(width of a head); T5's own: 1)", minimum=0.0
    )
    scale_output: bool = option(
        False, "multiply hidden states by hidden ** -0.5 before the output layer, as T5 with a tied one"
    )
    apply_query_key_layer_scaling: bool = option(
        False, "accepted: scores are summed and normalised in float32, where the scaling changes nothing"
    )
    attention_backend: str = option(
        "auto",
        "attention kernel; explicit is the readable reference",
        choices=("auto", "sdpa", "flash", "fused", "flex", "explicit", "unfused", "local"),
    )
    z_loss_coeff: float = option(
        0.0, "weight of log(Z)^2 in the loss (PaLM, section 5)", flags=("--z-loss",), minimum=0.0
    )
    loss_chunk_tokens: int = option(1024, "tokens whose float32 logits exist at one time", minimum=1)

    @property
    def architecture(self) -> Architecture:
        """All that depends on which model it is. Raises ConfigError where `model_type` names none."""
        return architecture(self.model_type)

    @property
    def decoder_layers(self) -> int:
        """Layers of the decoder beside an encoder; 0 for models of one stack."""
        return (self.decoder_num_layers or self.num_layers or 0) if self.architecture.decoder else 0

    @property
    def retrieval_layers(self) -> tuple[int, ...]:
        """Layers that attend to retrieved neighbours, counted from 0, in order; none where the model retrieves nothing.

        --retro-layer-numbers, or Megatron's: every third from the 6th, of more than 15 layers from the 9th.
        """
        if not self.architecture.retrieval:
            return ()
        layers = self.num_layers or 0
        return tuple(
            number - 1 for number in self.retro_layer_numbers or range(6 if layers <= 15 else 9, layers + 1, 3)
        )

    @property
    def retrieved_length(self) -> int:
        """Tokens of a neighbour, its continuation included."""
        return self.retro_num_retrieved_chunks * self.retro_gpt_chunk_length

    @property
    def all_layers(self) -> int:
        """Layers of all stacks."""
        return (self.num_layers or 0) + self.decoder_layers

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        """Number of key/value heads: all, one (multi-query) or the number of groups."""
        if self.attention_head_type == "multiquery":
            return 1
        return self.num_query_groups or self.num_attention_heads

    @property
    def activation(self) -> str:
        """That of the MLP: one of gelu, gelu_tanh, relu, squared_relu, swiglu, geglu, geglu_tanh, reglu, liglu."""
        if self.swiglu:
            return "swiglu"
        if self.glu_activation:
            return self.glu_activation
        if self.relu or self.squared_relu:
            return "relu" if self.relu else "squared_relu"
        return "gelu_tanh" if self.openai_gelu or (self.bias_gelu_fusion and self.add_bias_linear) else "gelu"

    @property
    def head_dropout(self) -> float:
        """Dropout before a head that classifies."""
        return self.hidden_dropout if self.classifier_dropout is None else self.classifier_dropout

    @property
    def head_activation(self) -> str:
        """That of BERT's head over the vocabulary, which Megatron does not fuse: gelu or gelu_tanh."""
        return "gelu_tanh" if self.openai_gelu else "gelu"

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies a gate with an up projection."""
        return self.activation in GLU_ACTIVATIONS

    @property
    def ffn_size(self) -> int:
        """Inner width of the MLP; where it is not named, Megatron's: 4h, with --swiglu 2/3 of it, a multiple of 64."""
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        return max(64, int(4 * self.hidden_size * 2 / 3) // 64 * 64) if self.swiglu else 4 * self.hidden_size

    @property
    def positions(self) -> str:
        """learned_absolute, rope, alibi, relative or none, whichever spelling was used."""
        if self.use_rotary_position_embeddings:
            return "rope"
        return POSITIONS.get(self.position_embedding_type, self.position_embedding_type)

    @property
    def causal(self) -> bool:
        """Whether a token sees only those before it, as in a model that writes text."""
        return self.architecture.causal

    @property
    def two_norms(self) -> bool:
        """Whether the MLP of a layer has its own norm."""
        return self.parallel_layernorm or not self.parallel_attn

    def window(self, layer: int) -> int | None:
        """Tokens that each token of this layer sees, None for all before it."""
        return None if layer in self.full_attention_layers else self.sliding_window

    @property
    def norm(self) -> str:
        """layernorm, rmsnorm or rmsnorm_1p."""
        return self.normalization.lower() + ("_1p" if self.apply_layernorm_1p else "")

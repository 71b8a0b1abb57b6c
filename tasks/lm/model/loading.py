"""Models and tokenizers: from the Hub, from a folder, or made from a configuration. safetensors only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tasks.lm.model.ends import PAD, fit_special_tokens, give_pad, save_tokenizer
from tasks.run.finite import NOT_FINITE, check_weights, first_not_finite
from tasks.run.ranks import is_first

EOS = "<|eos|>"


def load_tokenizer(base: str | Path, revision: str = "main", key: str = "model.base", needs_eos: bool = True):
    """A tokenizer with an eos and a pad token that differ (see :func:`tasks.lm.model.ends.give_pad`).

    Args:
        base: folder or Hub id.
        revision: on the Hub.
        key: of the parameter that names `base`, for messages.
        needs_eos: False for an encoder, which closes a document with a token of its own.

    Raises:
        ValueError: the tokenizer cannot be loaded, or has no eos token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(base), revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: no tokenizer in {base}: {_one_line(error)}") from error
    if needs_eos and tokenizer.eos_token_id is None:
        raise ValueError(f"{key}: the tokenizer of {base} has no eos token")
    give_pad(tokenizer)
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, with `<|pad|>` = 0 and `<|eos|>` = 1.

    Texts that hold too little to learn that many give fewer; a model is made to fit the tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def load_causal(base: str | Path, revision: str = "main", key: str = "model.base", **keys):
    """A causal language model with float32 weights.

    Args:
        base: folder or Hub id.
        revision: on the Hub.
        key: what names `base`, for messages.
        keys: for transformers' `from_pretrained`; a `dtype` is one for other weights than float32.

    Raises:
        ValueError: the folder or repository has no configuration or no safetensors weights, or a weight that
            is not finite.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, base, key, revision=revision, **keys)


def load_seq2seq(base: str | Path, revision: str = "main", key: str = "model.base", **keys):
    """An encoder-decoder with output embeddings, of float32 weights; arguments and errors as the above's."""
    from transformers import AutoModelForSeq2SeqLM

    return _load(AutoModelForSeq2SeqLM, base, key, revision=revision, **keys)


def load_reward(base: str | Path, revision: str = "main", key: str = "model.base", **keys):
    """A sequence-classification model with one label, float32; another model gets a fresh score head.

    Args:
        base: folder or Hub id.
        revision: on the Hub.
        key: what names `base`, for messages.
        keys: for transformers' `from_pretrained`.

    Raises:
        ValueError: as :func:`load_causal`.
    """
    from transformers import AutoModelForSequenceClassification

    keys = {"num_labels": 1, **keys}
    if keys["num_labels"] != 1:
        raise ValueError(f"{key}: num_labels is {keys['num_labels']}; a reward model has one label")
    return _load(AutoModelForSequenceClassification, base, key, revision=revision, **keys)


def load_encoder(
    base: str | Path, revision: str = "main", key: str = "model.base", layers: int | None = None, **keys
):
    """An encoder without a head, float32, of its first `layers` layers; None: of all.

    Raises:
        ValueError: as :func:`load_causal`; it has fewer layers, or a decoder beside it.
    """
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(str(base), revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: cannot load {base}: {_one_line(error)}") from error
    if config.is_encoder_decoder:
        raise ValueError(f"{key}: {base} is an encoder-decoder; an encoder is wanted")
    if layers is not None and layers > config.num_hidden_layers:
        raise ValueError(f"{key}: {base} has {config.num_hidden_layers} layers, {layers} are asked for")
    cut = {} if layers is None else {"num_hidden_layers": layers}
    return _load(AutoModel, base, key, revision=revision, **cut, **keys)


def create_reward(like: str | Path, key: str = "model.base"):
    """A sequence-classification model with one label and new weights, of the shape of one on disk.

    Args:
        like: folder or Hub id of a causal or a sequence-classification model.
        key: what names it, for messages.

    Raises:
        ValueError: it has no configuration, or none of a model that scores.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        config = AutoConfig.from_pretrained(str(like), num_labels=1)
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{key}: cannot make a model like {like}: {_one_line(error)}") from error


def create_causal(config: dict, tokenizer):
    """A causal language model made from nothing; `config` holds transformers' keys and `model_type`.

    Raises:
        ValueError: transformers does not know the model type, or refuses the configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = dict(config)
    kind = keys.pop("model_type")
    keys |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    keys |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **keys))
    except Exception as error:  # validation differs by model type
        raise ValueError(f"model.config: transformers refuses it: {_one_line(error)}") from error


def fit_embeddings(model, tokenizer) -> None:
    """Grow the embeddings to the tokenizer; tell the model its eos and pad (:mod:`tasks.lm.model.ends`)."""
    if len(tokenizer) > len(model.get_input_embeddings().weight):  # an adapter may stand there
        model.resize_token_embeddings(len(tokenizer))
    fit_special_tokens(model, tokenizer)


def save_model(model, tokenizer, folder: Path) -> None:
    """A plain transformers folder holding its tokenizer (write it into a staged path).

    Of several processes only the first writes; the others get an empty folder.

    Raises:
        ValueError: a weight that is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not is_first():
        return
    check_weights("the model is not saved", model)
    model.save_pretrained(folder)
    if getattr(model, "generation_config", None) is None:  # it scores: its pad is what its score is read by
        tokenizer.save_pretrained(folder)
    else:
        save_tokenizer(tokenizer, folder)


def check_keys(keys: dict, key: str = "model.base") -> None:
    """Refuse keys for transformers' `from_pretrained` that ask for what is never done here.

    Raises:
        ValueError: another format than safetensors, code that comes with a model, or more than the model.
    """
    rules = {
        "use_safetensors": ((None, True), "safetensors alone are read, no pickle"),
        "trust_remote_code": ((None, False), "code that comes with a model is never run"),
        "output_loading_info": ((None, False), "the model alone comes back"),
    }
    for name, (allowed, why) in rules.items():
        if keys.get(name) not in allowed:
            raise ValueError(f"{key}: {name}={keys[name]!r}: {why}")


def _load(auto, base: str | Path, key: str = "model.base", dtype=None, **keys):
    import torch
    from safetensors import SafetensorError

    check_keys(keys, key)
    older = keys.pop("torch_dtype", None)
    dtype = dtype or older
    folder = Path(base)
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        raise ValueError(f"{key}: the folder {base} holds no *.safetensors weights")
    try:
        keys = {"dtype": dtype or torch.float32, **keys, "use_safetensors": True}
        model = auto.from_pretrained(str(base), **keys)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        # RuntimeError, ImportError: quantised weights, and no GPU or package for them; the last: a cut file
        raise ValueError(f"{key}: cannot load {base}: {_one_line(error)}") from error
    if name := first_not_finite(model.named_parameters()):
        raise ValueError(f"{key}: {base}{_file_of(folder, name)}: {name} {NOT_FINITE}")
    return model


def _file_of(folder: Path, tensor: str) -> str:
    """`, <file>` for the one in which a tensor stands; nothing where the Hub's cache knows."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if tensor in file.keys():
                return f", {path.name}"
    return ""


def _one_line(error: BaseException) -> str:
    # transformers lists all its model types, or says what is wrong on the second line
    return " ".join(str(error).split())[:240] or type(error).__name__

"""Write a small Phi decoder with random weights, and a byte-level BPE tokenizer trained on LLaVA JSON files.

    python training/init_decoder.py --data-path data/easy-vqa/train.json data/easy-vqa/mosaics_train.json \\
        --output-dir build/decoder

The tokenizer lower-cases its input: the training text has no capitals, a user's question may.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from lightvlm.training.prepare_easy_vqa import COLUMNS, ROWS
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast, set_seed

END, PAD = "<|endoftext|>", "<|pad|>"


def texts(paths: list[Path]) -> Iterator[str]:
    """Yield every turn of every conversation."""
    for path in paths:
        for row in json.loads(path.read_text()):
            yield from (turn["value"].replace("<image>\n", "") for turn in row["conversations"])


def train_tokenizer(corpus: Iterator[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: frequent words become one token, and any other text can still be written."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    # "top left" is one word: of a place named by two tokens, small decoders learn the row and confuse the column.
    places = f" ?(?:{'|'.join(ROWS)}) (?:{'|'.join(COLUMNS)})"
    words = pre_tokenizers.Split(Regex(places + r"| ?\w+| ?[^\s\w]+|\s"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # In the chat template a question follows a line break, an answer a space; the template's own words are two more.
    spaced = [line for text in corpus for line in (text, f" {text}")]
    tokenizer.train_from_iterator([*spaced, *["user:", " assistant:"] * 100], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, model_max_length=2048
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-path", type=Path, nargs="+", required=True, help="LLaVA JSON files")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    tokenizer = train_tokenizer(texts(args.data_path))
    config = PhiConfig(
        vocab_size=-(-(len(tokenizer) + 1) // 64) * 64,  # with <image>, rounded up to a multiple of 64
        hidden_size=args.hidden_size,
        intermediate_size=4 * args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.hidden_size // 64,
        max_position_embeddings=2048,
        initializer_range=args.hidden_size**-0.5,  # at the usual 0.02, so narrow a decoder takes ages to compare words
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    PhiForCausalLM(config).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {len(tokenizer)} tokens, vocabulary of {config.vocab_size}")


if __name__ == "__main__":
    main()

"""Token ids as transformers and open_clip themselves make them, of strings in many scripts.

    make check-models                compares 1,000 strings and the kept cases
    make check-models RECORD=1       writes tests/data/words.json.gz anew

The vocabulary of CLIP is that in open_clip's wheel. It is too large to be kept, so there is a small one besides, which
is trained here. Those of SigLIP and SigLIP 2 are not to be had without a hub, so tokenizers are trained here, with the
normalisers, special tokens and padding of their classes.
"""

import gzip
import hashlib
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent.parent / "data" / "words.json.gz"
LIBRARIES = ("transformers", "tokenizers", "open_clip_torch", "ftfy")
COUNT = 1000
#: Of the kept cases, so many strings.
KEPT = 120
#: Words in 20 scripts.
SCRIPTS = (
    "a red car at night", "Ein grünes Haus, größer", "красная машина ночью", "κόκκινο αυτοκίνητο ΤΟΥΣ", "赤い車の写真",
    "红色的汽车", "빨간 자동차", "سيارة حمراء", "מכונית אדומה", "लाल गाड़ी", "লাল গাড়ি", "சிவப்பு கார்", "ఎరుపు కారు",
    "ಕೆಂಪು ಕಾರು", "ചുവന്ന കാർ", "รถสีแดง", "წითელი მანქანა", "կարմիր մեքենա", "ቀይ መኪና", "ລົດສີແດງ",
)  # fmt: skip
#: What words come with: odd spaces, emoji, punctuation, entities, broken encodings, special tokens.
ODD = (
    " ", "  ", "\t", "\n", "\u3000", "\u00a0", "\u200b", "🚗", "👩‍👩‍👧", "❤️", "_", "-", "'s", "“quoted”", "don't",
    "&amp;", "&amp;lt;",
    "schÃ¶n", "ﬁn", "ＡＢＣ", "İ", "ß", "e\u0301", "100%", "3.14", "#tag", "<|endoftext|>", "!!!", "…", "C'EST L'ÉTÉ",
)  # fmt: skip


def strings() -> list[str]:
    """1,000 strings, always the same ones."""
    source = random.Random(20)
    made = ["", " ", "\n\t ", *SCRIPTS, *ODD, "long " * 300, "長" * 400]
    while len(made) < COUNT:
        parts = [source.choice(source.choice((SCRIPTS, ODD))) for _ in range(source.randint(1, 5))]
        made.append(source.choice(("", " ", "  ")).join(parts))
    return made


@dataclass(frozen=True)
class LibraryTokenizer:
    """A library's tokenizer, and what a `.toml` says of the same.

    Attributes:
        path: its `tokenizer.json`. keys: of `[text]`.
        ids: from words to token ids, as the library makes them.
        stated: `tokenizer_config.json`.
        library: of transformers. size: how many tokens it has. end: the one that ends words.
    """

    path: Path
    keys: dict[str, Any]
    ids: Callable[[str], list[int]]
    stated: dict[str, Any]
    library: Any
    size: int
    end: int

    def save(self, folder: Path) -> None:
        """Write what lies beside a model."""
        shutil.copyfile(self.path, folder / "tokenizer.json")
        (folder / "tokenizer_config.json").write_text(json.dumps(self.stated))


def _trained(name: str, anew: bool, train: Callable[[], Any]) -> dict[str, Any]:
    """A `tokenizer.json`: the kept one, or one that is trained anew, which of equal pairs takes any first."""
    if anew:
        return dict(json.loads(train().to_str()))
    return dict(kept_words()["tokenizers"][name])


def kept_words() -> dict[str, Any]:
    """What `make check-models RECORD=1` wrote."""
    return dict(json.loads(gzip.decompress(DATA.read_bytes())))


def clip(folder: Path, anew: bool) -> Iterator[LibraryTokenizer]:
    """CLIP's tokenizer of transformers, and open_clip's own, with its vocabulary; then the first with a small one."""
    import open_clip
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    simple = open_clip.SimpleTokenizer()
    merges = [" ".join(pair) for pair in simple.bpe_ranks]
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in simple.encoder.items()}
    fast = CLIPTokenizer(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges])
    fast.backend_tokenizer.save(str(folder / "clip.json"))
    end = simple.eot_token_id
    options = {"padding": "max_length", "truncation": True, "max_length": 77}
    stated = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    both = partial(LibraryTokenizer, folder / "clip.json", stated=stated, library=fast, size=len(vocabulary), end=end)
    yield both(
        {"length": 77, "pad_id": end, "reference": "huggingface", "clean": "none"},
        lambda text: list(fast(text, **options)["input_ids"]),
    )
    yield both(
        {"length": 77, "pad_id": 0, "reference": "open_clip", "clean": "lower"},
        lambda text: simple(text)[0].tolist(),
    )
    begin, last = names.values()
    alphabet = pre_tokenizers.ByteLevel.alphabet()

    def train() -> Any:
        made, theirs = Tokenizer(models.BPE(end_of_word_suffix="</w>")), fast.backend_tokenizer
        made.normalizer, made.pre_tokenizer = theirs.normalizer, theirs.pre_tokenizer
        trainer = trainers.BpeTrainer(
            vocab_size=1000,
            special_tokens=[begin, last],
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        )
        made.train_from_iterator(strings(), trainer)
        return made

    kept = _trained("small-clip.json", anew, train)["model"]
    vocabulary = dict(kept["vocab"])
    for letter in sorted(alphabet):
        vocabulary.setdefault(letter + "</w>", len(vocabulary))
    small = CLIPTokenizer(vocab=vocabulary, merges=[tuple(merge) for merge in kept["merges"]])
    small.backend_tokenizer.save(str(folder / "small-clip.json"))
    yield LibraryTokenizer(
        folder / "small-clip.json",
        {"length": 77, "pad_id": vocabulary[last], "reference": "huggingface", "clean": "none"},
        lambda text: list(small(text, **options)["input_ids"]),
        stated,
        small,
        len(vocabulary),
        vocabulary[last],
    )


def webli(folder: Path, anew: bool) -> Iterator[LibraryTokenizer]:
    """SigLIP's cleaning, and SigLIP 2's class, on tokenizers that are trained here."""
    from open_clip.tokenizer import _clean_canonicalize
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, Siglip2Tokenizer
    from transformers.models.siglip.tokenization_siglip import SiglipTokenizer

    corpus = [text.lower() for text in strings()]

    def train_unigram() -> Any:
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=600, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        )
        made.train_from_iterator(corpus, trainer)
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        return made

    unigram = Tokenizer.from_str(json.dumps(_trained("siglip.json", anew, train_unigram)))
    unigram.save(str(folder / "siglip.json"))
    fast = PreTrainedTokenizerFast(tokenizer_object=unigram, pad_token="</s>", eos_token="</s>", unk_token="<unk>")
    options = {"padding": "max_length", "truncation": True, "max_length": 64}
    slow = SiglipTokenizer.__new__(SiglipTokenizer)
    slow.__dict__["do_lower_case"] = True
    stated = {"tokenizer_class": "SiglipTokenizer", "model_max_length": 64, "pad_token": "</s>"}
    both = partial(LibraryTokenizer, folder / "siglip.json", stated=stated, library=fast, size=len(fast), end=1)
    yield both(
        {"length": 64, "pad_id": 1, "reference": "huggingface", "clean": "canonicalize"},
        lambda text: list(fast(SiglipTokenizer.canonicalize_text(slow, text), **options)["input_ids"]),
    )
    yield both(
        {"length": 64, "pad_id": 1, "reference": "open_clip", "clean": "canonicalize"},
        lambda text: list(fast(_clean_canonicalize(text), **options)["input_ids"]),
    )
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]

    def train_bytes() -> Any:
        made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        made.normalizer = normalizers.Replace(" ", "▁")
        made.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
        made.train_from_iterator(
            corpus,
            trainers.BpeTrainer(vocab_size=900, special_tokens=special[:5], initial_alphabet=[], show_progress=False),
        )
        return made

    kept = _trained("siglip2.json", anew, train_bytes)["model"]
    vocabulary = dict(kept["vocab"])
    for byte in special[5:]:
        vocabulary.setdefault(byte, len(vocabulary))
    second = Siglip2Tokenizer(vocab=vocabulary, merges=[tuple(merge) for merge in kept["merges"]], padding_side="right")
    second.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    written = json.loads(second.backend_tokenizer.to_str())
    # What is published has no lower case in its file: the class puts it before.
    written["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    (folder / "siglip2.json").write_text(json.dumps(written))
    yield LibraryTokenizer(
        folder / "siglip2.json",
        {"length": 64, "pad_id": 0, "reference": "huggingface", "clean": "lower"},
        lambda text: list(second(text, **options)["input_ids"]),
        # Of SigLIP 2 before it had a class of its own, as it is published.
        {"tokenizer_class": "GemmaTokenizer", "model_max_length": 64, "pad_token": "<pad>", "padding_side": "right"},
        second,
        len(second),
        1,
    )


def tokenizers(folder: Path, anew: bool = False) -> list[LibraryTokenizer]:
    """All of them; their files lie in the folder.

    Args:
        anew: train those that are trained, instead of taking what is kept.
    """
    return [*clip(folder, anew), *webli(folder, anew)]


def _is_written_out(keys: dict[str, Any], text: str) -> bool:
    """Whether open_clip's own tokenizer, which has other names for its special tokens, takes one's name for words."""
    return (keys["reference"], keys["clean"]) == ("open_clip", "lower") and "<|endoftext|>" in text


def main() -> None:
    """Record, or compare ruiji's token ids of all strings with the libraries' own."""
    from pipeline.text_spec import TextSpec
    from workers.words import Words

    texts, kinds, files, differ, recording = strings(), [], {}, 0, "--record" in sys.argv
    with tempfile.TemporaryDirectory() as scratch:
        for made in tokenizers(Path(scratch), recording):
            file, keys = made.path.name, made.keys
            words = Words(TextSpec(Path(), made.path, padding_side="right", **keys))
            theirs = [made.ids(text) for text in texts]
            odd = [
                text
                for text, ids in zip(texts, theirs, strict=True)
                if words.tokens(text).ids.tolist() != ids and not _is_written_out(keys, text)
            ]
            differ += len(odd)
            print(f"{keys['reference']:<12} {keys['clean']:<13} {file:<13} {len(texts)} strings, {len(odd)} differ")
            for text in odd[:5]:
                print(f"  {text!r}")
            files[file] = json.loads(made.path.read_text())
            digests = [hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16] for ids in theirs]
            kinds.append({"file": file, "keys": keys, "ids": theirs[:KEPT], "digests": digests})
    # CLIP's vocabulary is open_clip's to give.
    kept = {name: value for name, value in files.items() if name != "clip.json"}
    kinds = [kind for kind in kinds if kind["file"] in kept]
    if not recording:
        others = sum(now != before for now, before in zip(kinds, kept_words()["kinds"], strict=True))
        print(f"{len(kinds)} kept kinds, {others} have other ids now")
        differ += others
    else:
        values = {"versions": {name: version(name) for name in LIBRARIES}, "tokenizers": kept, "kinds": kinds}
        DATA.write_bytes(gzip.compress(json.dumps(values, ensure_ascii=False).encode(), mtime=0))
        print(f"{DATA.name}: {DATA.stat().st_size} bytes")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()

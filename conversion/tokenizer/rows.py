"""Check that every id of a tokenizer has a row in the embedding; one without a row would end a run in an error."""

from pathlib import Path

from hf_llama3.errors import UserError, quoted

from ..checkpoint import Checkpoint
from ..config.schema import read_small
from .bounds import named_after, read_tokenizer_file
from .readings import read_beside


def require_rows(checkpoint: Checkpoint):
    """Check that every token of a Hugging Face tokenizer has a row.

    Raises:
        UserError: some have none; the sentence names them, and the command that adds rows.
    """
    if reason := tokens_without_rows(checkpoint):
        raise UserError(f"{reason}; give them rows: {resize(checkpoint)}")


def tokens_without_rows(checkpoint: Checkpoint) -> str | None:
    """Return a sentence about tokens without a row; None if there are none, or no Hugging Face tokenizer."""
    folder, rows = checkpoint.hf_tokenizer, checkpoint.config["vocab_size"]
    with named_after(checkpoint):
        tokens = read_tokens(folder) if folder is not None else {}
    homeless = sorted((index, name) for name, index in tokens.items() if index >= rows)
    if not homeless:
        return None
    shown = ", ".join(f"{quoted(name)} ({index})" for index, name in homeless[:3]) + (", ..." if homeless[3:] else "")
    return f"the embedding of {checkpoint.path} has {rows} rows, and its tokenizer {homeless[-1][0] + 1} ids: {shown}"


def resize(checkpoint: Checkpoint) -> str:
    """Return the command that makes a folder with a row for every id."""
    size, path = max(read_tokens(checkpoint.hf_tokenizer).values()) + 1, checkpoint.path
    return (
        'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"m = M.from_pretrained('{path}', dtype='auto'); m.resize_token_embeddings({size}); "
        f"[one.save_pretrained('{path}-resized') for one in (m, T.from_pretrained('{path}'))]\""
    )


def read_tokens(folder: Path) -> dict[str, int]:
    """Return the ids of a folder's tokens by their names.

    Tokens that other files than tokenizer.json name get the next ids, as transformers gives them.
    """
    added = read_small(path) if (path := folder / "added_tokens.json").is_file() else {}
    if not (folder / "tokenizer.json").is_file():
        return added
    raw = read_tokenizer_file(folder / "tokenizer.json")
    vocabulary = raw["model"]["vocab"]
    tokens = {entry["content"]: entry["id"] for entry in raw.get("added_tokens") or []}
    if not isinstance(vocabulary, dict):  # pieces with their scores
        return tokens | added
    tokens |= vocabulary
    following = max(tokens.values(), default=-1) + 1
    lacking = [name for name in read_beside(folder)[1] if name not in tokens]
    return tokens | {name: following + number for number, name in enumerate(lacking)}

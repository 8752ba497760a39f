"""Run in a process of its own: Meta's tokenizer and prompt format (wheel llama-models, imported as `models`).

Reads {"texts": [...], "dialogs": [[{"role", "content"}, ...], ...]} from standard input, writes their ids as JSON.
"""

import json
import sys

from models.datatypes import RawMessage
from models.llama3.chat_format import ChatFormat
from models.llama3.tokenizer import Tokenizer

request = json.load(sys.stdin)
tokenizer = Tokenizer.get_instance()
chat = ChatFormat(tokenizer)
json.dump(
    {
        "texts": [tokenizer.encode(text, bos=True, eos=False) for text in request["texts"]],
        "special": [tokenizer.encode(text, bos=True, eos=False, allowed_special="all") for text in request["texts"]],
        "dialogs": [
            chat.encode_dialog_prompt([RawMessage(**message) for message in dialog]).tokens
            for dialog in request["dialogs"]
        ],
        "n_words": tokenizer.n_words,
        "pad_id": tokenizer.pad_id,
        "stop_tokens": tokenizer.stop_tokens,
    },
    sys.stdout,
)

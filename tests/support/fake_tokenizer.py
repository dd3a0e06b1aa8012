"""A tokenizer of whole words, so that tests can read ids. It has the methods of Tokenizer that data loading uses."""

import numpy as np


class FakeTokenizer:
    """A decimal word becomes its own number, another word 10 plus its length: "12 and 345" -> 12, 13, 345. Ids below 10
    are special tokens."""

    bos = 0
    user_start, user_end, assistant_start, assistant_end = 1, 2, 3, 4
    vocab_size = 100_000

    def special(self, name):
        return getattr(self, name.strip("<|>"))

    def encode(self, text, prepend=None, append=None, num_threads=8):
        if isinstance(text, list):
            return [self.encode(t, prepend, append) for t in text]
        ids = [int(w) if w.isdecimal() else 10 + len(w) for w in text.split()]
        return ([] if prepend is None else [prepend]) + ids + ([] if append is None else [append])

    def encode_batch(self, texts, prepend=None):
        ids = [self.encode(text, prepend) for text in texts]
        return np.array([i for text in ids for i in text], np.uint32), np.cumsum([0, *map(len, ids)])

    def render_conversation(self, conversation, max_tokens=2048):
        ids, mask = [self.bos], [0]
        for message in conversation["messages"]:
            body = self.encode(message["content"])
            if message["role"] == "user":
                ids += [self.user_start, *body, self.user_end]
                mask += [0] * (len(body) + 2)
            else:
                ids += [self.assistant_start, *body, self.assistant_end]
                mask += [0] + [1] * (len(body) + 1)
        return ids[:max_tokens], mask[:max_tokens]

"""Measures bytes per token on seven texts, for our tokenizer and for the tokenizers of GPT-2 and GPT-4.

    python -m scripts.tok_eval

tiktoken loads the vocabularies of GPT-2 and GPT-4 from its cache or the network. A vocabulary that does not load is
skipped. The script adds one record per text to log.jsonl in $NANOCHAT_BASE_DIR/tokenizer.
"""

import itertools
import threading
from typing import TYPE_CHECKING

from nanochat_jax import commandline, config

if TYPE_CHECKING:  # importing this at run time would slow down --help
    import tiktoken

PEERS = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}
PEER_SECONDS = 20  # time limit for loading a vocabulary of 2 MB; without a network, tiktoken would try for minutes
SAMPLE_DOCUMENTS = 1024

NEWS = """The harbour bridge will close to lorries from Monday, the city council announced on Thursday evening, after
engineers found cracks in two of the steel hangers that carry the western deck. Cars and bicycles may still
cross, at no more than 30 kilometres an hour. "Nobody needs to worry about driving home tonight," said Marta
Lindqvist, who heads the council's roads department, "but we would rather inconvenience hauliers for six weeks
than explain in 2031 why we did not." Repairs are expected to cost $14.7 million, roughly a third of the
department's yearly budget. Shop owners on the north bank, who lost 22% of their trade during the works of 2019,
asked for a shuttle ferry; the mayor promised an answer by Friday. The 98-year-old bridge carries about 41,000
vehicles a day, twice what its builders had planned for.
"""
KOREAN = """지난 주말 작은 도서관이 다시 문을 열었다. 비가 새던 지붕을 고치고 낡은 책장을 바꾸는 데 꼬박
여덟 달이 걸렸다고 한다. 아이들은 창가에 앉아 그림책을 읽고, 어른들은 새로 들어온 잡지를
뒤적였다. 사서 김미영 씨는 "책을 빌리러 오는 사람보다 이야기를 나누러 오는 사람이 더 많다"며
웃었다. 도서관은 평일 오전 9시부터 저녁 8시까지 열고, 매달 둘째 월요일에는 쉰다. 다음 달부터는
어르신을 위한 컴퓨터 교실과 청소년 글쓰기 모임도 시작할 예정이다.
"""
CODE = '''from collections import deque


class LRUCache:
    """A mapping that forgets what was used least recently."""

    def __init__(self, capacity: int = 128):
        if capacity <= 0:
            raise ValueError(f"capacity must be positive, got {capacity!r}")
        self.capacity, self._data = capacity, {}

    def __getitem__(self, key):
        self._data[key] = value = self._data.pop(key)  # move to the end
        return value

    def __setitem__(self, key, value):
        self._data.pop(key, None)
        if len(self._data) >= self.capacity:
            del self._data[next(iter(self._data))]
        self._data[key] = value


def shortest_path(graph, start, goal):
    queue, parent = deque([start]), {start: None}
    while queue:
        node = queue.popleft()
        if node == goal:
            path = []
            while node is not None:
                path.append(node)
                node = parent[node]
            return path[::-1]
        for neighbour in graph[node]:
            if neighbour not in parent:
                parent[neighbour] = node
                queue.append(neighbour)
    return None
'''
MATH = r"""\begin{theorem}
Let $f \colon [a, b] \to \mathbb{R}$ be continuous and differentiable on $(a, b)$. Then there is a $\xi \in (a, b)$ with
\[ f'(\xi) = \frac{f(b) - f(a)}{b - a}. \]
\end{theorem}
\begin{proof}
Put $g(x) = f(x) - f(a) - \frac{f(b) - f(a)}{b - a}\,(x - a)$. Since $g(a) = g(b) = 0$, Rolle's theorem gives a $\xi$
with $g'(\xi) = 0$, which is the claim. For $f(x) = x^3$ on $[0, 3]$ it says $3\xi^2 = 27/3 = 9$, so $\xi = \sqrt{3}$.
\end{proof}
\begin{equation}
\sum_{k=0}^{n} \binom{n}{k} x^{k} y^{n-k} = (x + y)^{n}, \qquad
\int_{-\infty}^{\infty} e^{-x^{2}/2}\,dx = \sqrt{2\pi}, \qquad
\lim_{n \to \infty} \left(1 + \frac{1}{n}\right)^{n} = e \approx 2.71828
\end{equation}
"""
SCIENCE = """Mitochondria carry a genome of their own, a ring of about 16,500 base pairs in humans, which encodes
thirteen proteins of the respiratory chain together with the transfer and ribosomal RNAs needed to make them. All the
other mitochondrial proteins, more than a thousand, are encoded in the nucleus, translated in the cytosol and
imported through channels in the outer and inner membranes. The electrochemical gradient across the inner
membrane, some 180 millivolts, drives ATP synthase: protons that flow back into the matrix turn its rotor, and
each full turn yields three molecules of adenosine triphosphate. Because reactive oxygen species arise beside
the unprotected DNA, its mutation rate is an order of magnitude above that of nuclear genes, which makes it
useful for tracing maternal lineages over a few thousand years.
"""


def main(cfg: config.TokEval) -> None:
    from nanochat_jax import run_log
    from nanochat_jax.data import sources
    from nanochat_jax.tokenizer import Tokenizer

    folder = config.base_dir() / "tokenizer"
    ours = Tokenizer.load(folder)
    source = sources.open(cfg.data, cfg.data_dir)
    texts = {"news": NEWS, "korean": KOREAN, "code": CODE, "math": MATH, "science": SCIENCE}
    for split in ("train", "val"):
        texts[split] = "\n".join(itertools.islice(source.texts(split), SAMPLE_DOCUMENTS))

    # Count the tokens of each text with each vocabulary, and check that decoding restores the text.
    encoders = {"ours": (ours.vocab_size, ours.encode, ours.decode)}
    for label, name in PEERS.items():
        peer = _load_peer(name)
        if peer is None:
            print(f"{label}: skipped, tiktoken found {name} neither in its cache nor on the network")
        else:
            encoders[label] = (peer.n_vocab, peer.encode_ordinary, peer.decode)
    counts = {label: {} for label in encoders}
    for label, (_, encode, decode) in encoders.items():
        for task, text in texts.items():
            ids = encode(text)
            assert decode(ids) == text, f"decoding does not restore the text {task!r} with {label}"
            counts[label][task] = len(ids)

    print("vocabulary: " + ", ".join(f"{label} {size:,}" for label, (size, *_) in encoders.items()))
    _print_table(texts, counts)
    for task, text in texts.items():
        peers = {_field(label): counts[label][task] if label in counts else None for label in PEERS}
        run_log.append(
            folder, kind="tok_eval", stage="tok", step=0, task=task, source=source.name,
            bytes=len(text.encode("utf-8")), tokens=counts["ours"][task], **peers,
        )  # fmt: skip


def _field(label: str) -> str:
    """Returns the log field that holds a peer's token count, such as gpt2_tokens for GPT-2."""
    return label.replace("-", "").lower() + "_tokens"


def _load_peer(name: str) -> "tiktoken.Encoding | None":
    """Returns tiktoken's encoding called `name`, or None if the encoding does not load within PEER_SECONDS.

    Loads the encoding in a thread, because a download may hang.
    """
    import tiktoken

    loaded = []

    def load() -> None:
        try:
            loaded.append(tiktoken.get_encoding(name))
        except Exception:  # a broken network, proxy or cache file may cause any exception
            return

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(PEER_SECONDS)
    return loaded[0] if loaded else None


def _print_table(texts: dict[str, str], counts: dict[str, dict[str, int]]) -> None:
    """Prints one row per text. A positive percentage means that our tokenizer needs fewer tokens than the peer."""
    peers = [label for label in counts if label != "ours"]
    head = f"{'text':<8}{'bytes':>12}{'tokens':>12}{'bytes/token':>13}"
    print(head + "".join(f"{label:>9}{'ours vs':>10}" for label in peers))
    for task, text in texts.items():
        size, tokens = len(text.encode("utf-8")), counts["ours"][task]
        line = f"{task:<8}{size:>12,}{tokens:>12,}{size / max(tokens, 1):>13.2f}"
        for label in peers:
            theirs = max(counts[label][task], 1)
            line += f"{size / theirs:>9.2f}{100 * (theirs - tokens) / theirs:>+9.1f}%"
        print(line)


if __name__ == "__main__":
    commandline.run(main, config.TokEval)

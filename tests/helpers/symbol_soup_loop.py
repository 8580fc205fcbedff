"""SymbolSoup written letter by letter, as it is defined: what the vectorised generator is compared with."""

STYLES = {
    "L0": "jdifchklanogmpeb",
    "L1": "bjmkpnhgacdloife",
    "L2": "ngpfediojcmabhlk",
    "L3": "gpcknjaoldhifemb",
    "R0": "fmpeldcbijakngho",
    "R1": "lfpoakjhigmdnceb",
    "R2": "kbjegaiplhocmfdn",
    "R3": "opfmedbkanjilhgc",
    "R4": "lnagobhfcikjedmp",
}
ALPHABET = "abcdefghijklmnop"
MOTIFS = [ALPHABET[i : i + k] for i in range(16) for k in (3, 4, 5) if i + k <= 16]


def unigram(style, letter):
    rank = STYLES[style].index(letter)
    return 3 if rank < 4 else 2 if rank < 8 else 1


def bigram(style, before, letter):
    """How much more likely a letter is after another."""
    P, S = STYLES[style][:4], STYLES[style][4:8]
    preferred = [(P[i], P[(i + 1) % 4]) for i in range(4)]
    preferred += [pair for i in range(4) for pair in ((P[i], P[i]), (S[i], S[i]), (P[i], S[i]), (S[i], P[i]))]
    return 4 if (before, letter) in preferred else 1


def motif(style, text):
    P, S = STYLES[style][:4], STYLES[style][4:8]
    return 1 + 0.9 * sum(letter in P for letter in set(text)) + 0.5 * sum(letter in S for letter in set(text))


def distributions(style, length, before):
    """The pieces that can come next in a block where `length` letters are left, each with its probability."""
    fitting = [text for text in MOTIFS if len(text) <= length]
    rate = 0.3 if fitting else 0.0
    letters = [unigram(style, c) * (bigram(style, before, c) if before else 1) for c in ALPHABET]
    motifs = [motif(style, text) for text in fitting]
    found = {c: (1 - rate) * w / sum(letters) for c, w in zip(ALPHABET, letters, strict=True)}
    return found | {text: rate * w / sum(motifs) for text, w in zip(fitting, motifs, strict=True)}


class Loop:
    """`random` is a random.Random."""

    def __init__(self, random):
        self.random, self.known = random, {}

    def block(self, style, length):
        text = ""
        while len(text) < length:
            key = style, min(length - len(text), 5), text[-1:]
            if key not in self.known:
                self.known[key] = distributions(*key)
            pieces = self.known[key]
            text += self.random.choices([*pieces], [*pieces.values()])[0]
        return "".join(self.flipped(letter) if self.random.random() < 0.03 else letter for letter in text)

    def flipped(self, letter):
        return self.random.choice(ALPHABET.replace(letter, ""))

    def noise(self, length):
        return "".join(self.random.choices(ALPHABET, k=length))

    def pieces(self, label, shortest=400, longest=600):
        """Noise, block, noise, block, noise of a row of a class."""
        R = self.random.randint
        M = R(max(5, -(-(shortest - 13) // 2)), max(5, (longest - 13) // 2))
        low = max(3, int(0.3 * M))
        noise = min(R(low, max(low, int(0.6 * M))), M - 2)
        left = R(1, M - noise - 1)
        n0 = R(1, noise - 2)
        n1 = R(1, noise - n0 - 1)
        blocks = [
            self.block(f"L{label // 5}", left),
            self.block(f"R{label % 5}", M - noise - left),
        ]
        if self.random.random() < 0.5:
            blocks.reverse()
        return [self.noise(n0), blocks[0], self.noise(n1), blocks[1], self.noise(noise - n0 - n1)]

    def text(self, pieces):
        """The row's text, up to the label."""
        tags = ["<bos>", "<sep1>", "<sep2>", "<sep1>", "<sep2>"]
        return "\n".join(
            line for tag, piece in zip(tags, pieces, strict=True) for line in (tag, " ".join(piece))
        ) + ("\n<sep> <label>")

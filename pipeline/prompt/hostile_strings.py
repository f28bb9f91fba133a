"""Texts that try a tokenizer: what people write, and what they do not.

A tokenizer that was converted wrongly usually agrees with the original on plain English. `hostile_strings` goes where
two implementations part: digits, white space, scripts, joined and combined characters, the text of special tokens,
control characters, code points that are not assigned.
"""

import random
from collections.abc import Callable, Sequence

_WORDS = (  # noqa: SIM905
    "the a lamp Kitchen LIGHTS don't they'll I'VE it's we'd turn off bedroom 7pm o'clock naïve façade coöperate "
    "Straße Ærø señor über İstanbul ﬁne ﬂow Ⅻ ½ ² ³ № ™ € £ ¥ § ¶ … — – ‘quoted’ “quoted” «quoted» state-of-the-art "
    "e-mail@example.com https://example.com/a?b=c&d=%20 C:\\dir\\file.txt /usr/bin/env #tag @name 100% $5.00 1,000.50"
).split()
_SCRIPTS = {
    "Chinese": "请把厨房的灯打开，谢谢。温度调到二十一度！「你好」",
    "Japanese": "キッチンの明かりをつけてください。ﾊﾝｶｸ ｶﾀｶﾅ がぎぐげご",
    "Korean": "부엌 불을 켜 주세요 한글",
    "Russian": "Включи свет на кухне, пожалуйста. Ёлка",
    "Greek": "Άναψε το φως στην κουζίνα ΣΣς",
    "Arabic": "أشعل ضوء المطبخ من فضلك ١٢٣ مَرْحَبًا لله ﷺ",
    "Hebrew": "הדלק את האור במטבח בבקשה שָׁלוֹם",
    "Hindi": "रसोई की बत्ती जला दो क्षत्रिय १२३",
    "Thai": "เปิดไฟในครัว น้ำ กำลัง ๑๒๓",
    "Khmer": "កាន់តែពិសេសអាច",
    "Tamil": "சமையலறை விளக்கை எரி கொ",
    "Georgian": "ჩართე შუქი სამზარეულოში",
    "Amharic": "መብራት አብራ",
    "Tibetan": "བོད་སྐད་",
    "Vietnamese": "Bật đèn nhà bếp ệ ữ ở",
    "Old": "𐤀𐤁𐤂 𒀀𒀁 𓀀𓀁 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 ᚠᚢᚦ",
}
_EMOJI = "😀 🚀 🦙 ✅ ❤️ ❤ ☀️ 👍🏽 👩‍👩‍👧‍👦 👨🏿‍🚀 🏳️‍🌈 🏴‍☠️ 🇩🇪 🇩🇪🇫🇷 1️⃣ #️⃣ 😶‍🌫️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ‍ ️".split(" ")  # noqa: SIM905
_MARKS = "̧̣̱̀́̂̃̈̊̌́̄͜͡҉⃝゙゚ัิ़्ًُِّْ่้"
_SPACES = " \t\n\r\v\f\u00a0\u1680\u2000\u2003\u2009\u200b\u2028\u2029\u202f\u205f\u3000\ufeff\u0085"
_INVISIBLE = "\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2069\u00ad\u034f\u180e\ufe0e\ufe0f"
# Not text at all, but encodable: replacement, non-characters, private use, unassigned, the last code point.
_ODD = "\ufffd\ufffe\uffff\ufdd0\ue000\uf8ff\U000f0000\U0010ffff\u0378\u0530\U0001fffe\U000e0001\U000e007f\ufff9\ufffc"
_SPECIAL = (  # noqa: SIM905
    "<|im_start|> <|im_end|> <|endoftext|> <|im_start|>user <s> </s> <unk> <pad> <bos> <eos> [INST] [/INST] <<SYS>> "
    "<|begin_of_text|> <|start_header_id|> <|eot_id|> <start_of_turn> <end_of_turn> <|user|> <|assistant|> <|system|> "
    "<think> </think> <tool_call> </tool_call> <|fim_prefix|> <repo_name> <|im_start| im_end|> <|im_end |> <|IM_END|>"
).split()
_CODE = (
    "def f(x: int) -> int:\n    return x ** 2  # squared\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i];\n}\n",
    'printf("%5.2f\\n", 3.14159);',
    '{"device": "lamp", "room": null, "value": -1.5e-10, "on": true}',
    "SELECT * FROM t WHERE a <> 'it''s' -- comment\n",
    '<div class="a">&nbsp;&lt;b&gt;</div>\r\n',
    "{{ message['content'] | trim }}{% if x %}{% endif %}{# note #}",
    '{{ range .Messages }}{{ if eq .Role "user" }}{{ .Content }}{{ end }}{{ end }}',
    'TEMPLATE """{{ .Prompt }}"""\nPARAMETER stop "\\"\n',
    "\\x00 \\u0041 \\n \\\\ \\\" \\' ${HOME} $(ls) `ls` !!1 ~/.x *.py\n",
    "#!/bin/sh\nset -eu\nfind . -name '*.o' -print0 | xargs -0 rm -f\n",
    "λx.x x ∀x∈ℝ: ⌈x⌉ = −⌊−x⌋ ∑ᵢ xᵢ² ≤ ∞ → ⊥",
)


def hostile_strings(count: int = 5000, seed: int = 0, special_tokens: Sequence[str] = ()) -> list[str]:
    """Varied texts for comparing two tokenizers.

    Args:
        count: how many; each is different.
        seed: the same seed gives the same texts.
        special_tokens: texts of the tokenizer's own special tokens, to be mixed in.

    Returns:
        Texts that UTF-8 can hold (no lone surrogates), of 1 to about 20,000 characters.
    """
    random_numbers = random.Random(seed)
    special = [*_SPECIAL, *special_tokens]
    kinds = _makers(random_numbers, special)
    # The fixed ones first, so that every count has them.
    texts = dict.fromkeys(
        [*_CODE, *_SCRIPTS.values(), *_EMOJI, *_SPACES, *_INVISIBLE, *_ODD, *special, "\x00", " \x04\x95"]
    )
    texts.pop("", None)
    number = 0
    while len(texts) < count:
        texts[kinds[number % len(kinds)]()] = None
        texts.pop("", None)
        number += 1
    return list(texts)[:count]


def _makers(dice: random.Random, special: Sequence[str]) -> list[Callable[[], str]]:
    """A function for every kind of text."""

    def some(alphabet: Sequence[str], most: int, joint: str = "") -> str:
        return joint.join(dice.choice(alphabet) for _ in range(dice.randint(1, most)))

    def words() -> str:
        return some(_WORDS, 30, " ")

    def digits() -> str:
        return some("0123456789" * 3 + ".,:-+eE/% ", 40)

    def script() -> str:
        text = _SCRIPTS[dice.choice(sorted(_SCRIPTS))]
        start = dice.randrange(len(text))
        return text[start : start + dice.randint(1, 20)]

    def mixed_scripts() -> str:
        return some(["", " ", "\n", ", "], 1).join(script() for _ in range(dice.randint(2, 6)))

    def emoji() -> str:
        return some([*_EMOJI, " ", "a"], 12)

    def marks() -> str:
        return "".join(dice.choice("aeioun กकשع 가") + some(_MARKS, 3) for _ in range(dice.randint(1, 12)))

    def spaces() -> str:
        return some(_WORDS, 2, " ") * dice.randint(0, 1) + some(_SPACES, 30) + some(_WORDS, 1) * dice.randint(0, 1)

    def plain_spaces() -> str:
        return "".join(dice.choice(["x", "1", ".", ""]) + dice.choice(" \n\t\r") * dice.randint(1, 9) for _ in range(8))

    def controls() -> str:
        return some([chr(code) for code in (*range(1, 32), *range(127, 160))] + ["a", "1", " "], 20)

    def invisible() -> str:
        return some([*_INVISIBLE, *_WORDS], 12)

    def odd() -> str:
        return some([*_ODD, "a", " "], 10)

    def any_code_points() -> str:
        points: list[str] = []
        while len(points) < 12:
            code = dice.randrange(1, 0x110000 if dice.random() < 0.3 else 0x3000)
            if not 0xD800 <= code <= 0xDFFF:
                points.append(chr(code))
        return "".join(points)

    def code() -> str:
        text = some(_CODE, 3)
        start = dice.randrange(len(text) // 2)
        return text[start : start + dice.randint(5, 200)]

    def special_text() -> str:
        return some([*special, " ", "\n", "hello", "1", "é"], 10)

    def broken_special() -> str:
        token = dice.choice(special)
        cut = dice.randint(1, len(token))
        return token[:cut] + dice.choice(["", " ", "x", "|"]) + token[cut:] + dice.choice(["", ">", "\n"])

    def punctuation() -> str:
        return some("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", 30)

    def contractions() -> str:
        return some(["'s", "'S", "'re", "'RE", "'ll", "’s", "'", "''", "d", "I", "we", " ", "1"], 15)

    def run() -> str:
        return dice.choice([*"a =-_#.\n0é中😀", "ab", "haha", "=-"]) * dice.randint(2, 400)

    def very_long() -> str:
        # Seldom: a BPE merge is slower than linear in some implementations.
        if dice.random() < 0.9:
            return mixed()
        return some(["a", "x", "中", "é", "ab"], 1) * dice.randint(2000, 10000)

    def mixed() -> str:
        parts = [words, digits, script, emoji, spaces, code, special_text, punctuation]
        return "".join(dice.choice(parts)() for _ in range(dice.randint(2, 5)))

    return [
        words,
        digits,
        script,
        mixed_scripts,
        emoji,
        marks,
        spaces,
        plain_spaces,
        controls,
        invisible,
        odd,
        any_code_points,
        code,
        special_text,
        broken_special,
        punctuation,
        contractions,
        run,
        very_long,
        mixed,
    ]

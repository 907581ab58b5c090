"""Which encoding of the time before UTF-8 a text is in: the one in which its letters beyond ASCII are likely ones."""

import codecs
from collections import Counter
from functools import lru_cache
from math import log

# The letters beyond ASCII of languages, the most frequent first.
_LATIN = {
    "cp1252 mac_roman cp850": (
        "éèàêçâîôùûïëœ",
        "üäöß",
        "óíáéñú¿¡ü",
        "ãçéáíóêõúàâô",
        "èàùòéì",
        "äåöé",
        "øåæé",
        "íáðéöúþóýæ",
        "äõüöšž",
        "àéèíóòçúï·",
        "éüäàèößçáíóñêåøãïôûâîúõæëìù",
    ),
    "cp1250 iso8859_2 cp852": ("íáěéřčžýšůúňťďó", "łąęóżśćńź", "áíéýžčšťúôľňďäóĺŕ", "áéőöóíüúű", "ăîşţâ", "čšžćđ"),
    "cp1254": ("ıüşğçöâî", "əıüöğşç"),
    "cp1257": ("ėšųžįūąčę", "āīēšūņļķģčž", "äõüöšž"),
}
_OTHER = {
    "cp1251 koi8_r koi8_u cp866 iso8859_5 mac_cyrillic": (
        "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфъё",
        "оанивіертлскудмпязьйбгчцхїжшюєщґф",
        "аиеотнрсвлкдпмзябъугчцйжщхфшюь",
        "аоиенрстјукдмлвпзгбшчцљжњхћђфџ",
    ),
    "cp1253 iso8859_7": ("αοιετσνηυρπκμλςωόίάδγθήέχύφβώξζψ",),
    "cp1255 iso8859_8": ("יוהלארמתשבנקדעחכפםגסטצזןךץף",),
    "cp1256 iso8859_6": ("اليمونرتبةعدسفهكقحجأذصىشطخإضءئزثآظغؤ",),
    "cp874": ("านรอ่กเงมย้ลวดิตัสทีคะปบุหูแขจใไพชผโถ็ษณ์ำืึธภๆศซฟญฐ",),
}
_SIGNS = "’“”‘–—…„«»°€£§•·©®™½¼²³±×µ´"
_SIGN, _UNKNOWN = log(0.01), log(0.0001)
_CAPITALS = 0.05  # of the letters
# A text is in the usual encoding of its language rather than in an old Mac's or that of DOS.
_USUAL = {"cp1252": 0.0, "cp1251": -0.5}
_UNUSUAL = -2.0
_LIKELY = -5.0  # the mean logarithm of a text's letters; by chance it is about -8
_KANA = "".join(map(chr, range(0x3041, 0x3094))) + "ー、。"
_EAST_ASIAN = {
    "shift_jis": _KANA,
    "euc_jp": _KANA,
    "gb18030": "的一是不了在有人我他这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后小"
    "么心多天而能好都然没日于起还发成事只作当想看文无开手十用主行方又如前所本见经头面公同三已老从动两长，。、",
    "big5": "的一是不了在有人我他這中大來上個國到說們為子和你地出道也時年得就那要下以生會自著去之過家學對可她裡後小"
    "麼心多天而能好都然沒日於起還發成事只作當想看文無開手十用主行方又如前所本見經頭面公同三已老從動兩長，。、",
    "euc_kr": "이다는을를에의가고은로하지도서한기사리나자어아라시그대인해수있들과일으게정보부장전구상주제여만면"
    "스마원성우비었조거것적모무동오",
}
"""Of encodings with several bytes a character, the most frequent ones."""
_CERTAIN, _POSSIBLE = 0.3, 0.1  # shares of frequent characters


@lru_cache
def _profiles() -> list[tuple[str, dict[str, float]]]:
    """Of each language in each encoding, the logarithm of its letters' shares."""
    return [
        (encoding, _shares(letters))
        for encodings, languages in (_LATIN | _OTHER).items()
        for encoding in encodings.split()
        for letters in languages
    ]


def _shares(letters: str) -> dict[str, float]:
    weights = {letter: 1 / (rank + 3) for rank, letter in enumerate(letters)}
    total = sum(weights.values())
    shares = dict.fromkeys(_SIGNS, _SIGN)
    for letter, weight in weights.items():
        capital = letter.upper()
        if len(capital) == 1:
            shares[capital] = log(_CAPITALS * weight / total)
        shares[letter] = log(weight / total)
    return shares


def guess(data: bytes) -> str:
    """The likeliest encoding of a text that is not UTF-8; empty if its letters are likely in none."""
    likelihood, single = _single_bytes(data)
    share, several = max((_frequent_share(data, encoding), encoding) for encoding in _EAST_ASIAN)
    if share > _CERTAIN:
        return several
    return single if likelihood > _LIKELY else several if share > _POSSIBLE else ""


def _frequent_share(data: bytes, encoding: str) -> float:
    """How many of the characters beyond ASCII are frequent ones; none if the bytes are not in this encoding."""
    text = codecs.getincrementaldecoder(encoding)(errors="replace").decode(data)
    characters = Counter(character for character in text if character >= "\x80")
    if not characters or characters["\ufffd"] > characters.total() // 50:
        return 0.0
    return sum(characters[character] for character in _EAST_ASIAN[encoding]) / characters.total()


def _single_bytes(data: bytes) -> tuple[float, str]:
    """The likeliest encoding of one byte a character, and how likely the text's letters are in it."""
    counts = Counter(data)
    high = {byte: count for byte, count in counts.items() if byte >= 0x80}
    best, chosen = -1e9, "cp1252"
    for encoding, shares in _profiles():
        letters = bytes(high).decode(encoding, errors="replace")
        likelihood = sum(
            count * shares.get(letter, _UNKNOWN) for letter, count in zip(letters, high.values(), strict=True)
        )
        likelihood += _USUAL.get(encoding, _UNUSUAL)
        if likelihood > best:
            best, chosen = likelihood, encoding
    return best / max(1, sum(high.values())), chosen

"""Texts of the time before UTF-8, in the encodings that their languages were written in."""

import pytest

from nectar_mlx.documents import legacy
from nectar_mlx.documents.encoding import decode
from nectar_mlx.documents.reading import Unreadable

TEXTS = {
    "ru": (
        "Вчера вечером мы долго гуляли по набережной, а потом вернулись домой. Завтра приедет сестра с детьми.",
        "cp1251 koi8_r cp866 iso8859_5 mac_cyrillic",
    ),
    "uk": (
        "Учора ввечері ми довго гуляли набережною, а потім повернулися додому. Їжак і ґава живуть у лісі.",
        "cp1251 koi8_u",
    ),
    "bg": ("Вчера вечерта дълго се разхождахме по крайбрежната улица. Утре ще дойде сестра ми с децата.", "cp1251"),
    "el": (
        "Χθες το βράδυ περπατήσαμε πολύ ώρα στην παραλία και μετά γυρίσαμε σπίτι.",
        "cp1253 iso8859_7",
    ),
    "he": ("אתמול בערב טיילנו זמן רב לאורך הטיילת ואז חזרנו הביתה. מחר תבוא אחותי עם הילדים.", "cp1255 iso8859_8"),
    "ar": ("مشينا طويلا مساء أمس على الكورنيش ثم عدنا إلى البيت. غدا ستأتي أختي مع الأطفال.", "cp1256 iso8859_6"),
    "th": ("เมื่อวานเย็นเราเดินเล่นริมน้ำนานมากแล้วกลับบ้าน พรุ่งนี้พี่สาวจะมาพร้อมกับเด็กๆ บนโต๊ะมีหนังสือเปิดอยู่", "cp874"),
    "ja": (
        "昨日の夕方、私たちは川沿いを長く散歩して、それから家に帰りました。明日は姉が子供たちと来ます。",
        "shift_jis euc_jp",
    ),
    "zh": ("昨天晚上我们沿着河边散步了很久,然后回家。明天姐姐会带孩子们来。", "gb18030"),
    "zht": ("昨天晚上我們沿著河邊散步了很久,然後回家。明天姐姐會帶孩子們來。", "big5"),
    "ko": ("어제 저녁 우리는 강가를 오래 산책한 다음 집으로 돌아왔다. 내일은 누나가 아이들과 함께 온다.", "euc_kr"),
    "pl": (
        "Wczoraj wieczorem długo spacerowaliśmy bulwarem, a potem wróciliśmy do domu. Jutro przyjedzie siostra.",
        "cp1250 iso8859_2 cp852",
    ),
    "cs": (
        "Včera večer jsme dlouho chodili po nábřeží a pak jsme se vrátili domů. Zítra přijede sestra s dětmi.",
        "cp1250 iso8859_2 cp852",
    ),
    "hu": (
        "Tegnap este sokáig sétáltunk a parton, aztán hazamentünk. Holnap jön a nővérem a gyerekekkel.",
        "cp1250 iso8859_2",
    ),
    "ro": ("Aseară ne-am plimbat mult pe faleză, apoi ne-am întors acasă. Mâine vine sora mea cu copiii.", "cp1250"),
    "tr": ("Dün akşam sahilde uzun süre yürüdük, sonra eve döndük. Yarın kız kardeşim çocuklarla gelecek.", "cp1254"),
    "lt": (
        "Vakar vakare ilgai vaikščiojome krantine, o paskui grįžome namo. Rytoj atvažiuos sesuo su vaikais.",
        "cp1257",
    ),
    "lv": (
        "Vakar vakarā mēs ilgi staigājām pa krastmalu un pēc tam atgriezāmies mājās. Rīt atbrauks māsa ar bērniem.",
        "cp1257",
    ),
    "et": (
        "Eile õhtul jalutasime kaua rannapromenaadil ja läksime siis koju. Homme tuleb õde lastega.",
        "cp1257 cp1252",
    ),
    "fr": (
        "Hier soir, nous nous sommes longtemps promenés sur le quai, puis nous sommes rentrés. Où étiez-vous à Noël ?",
        "cp1252 mac_roman cp850",
    ),
    "de": (
        "Gestern Abend sind wir lange am Ufer spazieren gegangen. Äpfel und Öl sind größer als süß.",
        "cp1252 mac_roman cp850 cp437",
    ),
    "es": (
        "Ayer por la tarde paseamos mucho por el malecón y después volvimos. Mañana vendrá mi hermana con los niños.",
        "cp1252 mac_roman cp850",
    ),
    "sv": (
        "I går kväll promenerade vi länge längs vattnet och åkte sedan hem. I morgon kommer min syster på besök.",
        "cp1252 cp850",
    ),
    "pt": (
        "Ontem à noite passeámos muito pela marginal e depois voltámos. Amanhã virá a minha irmã com as crianças.",
        "cp1252",
    ),
    "is": (
        "Í gærkvöldi gengum við lengi meðfram ströndinni og fórum svo heim. Á morgun kemur systir mín með börnin.",
        "cp1252",
    ),
    "en": (
        "It’s a “naïve” café — don’t worry. The résumé costs £5 or €6… and that’s all, said Mr.",
        "cp1252 mac_roman",
    ),
}


@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize(
    ("text", "encoding"), [(text, encoding) for text, encodings in TEXTS.values() for encoding in encodings.split()]
)
def test_letters_tell_the_encoding(text: str, encoding: str, times: int) -> None:
    text = "\n".join([text.encode(encoding, "ignore").decode(encoding)] * times)
    assert decode(text.encode(encoding)) == (text, [])


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("It’s a “naïve” café — Übung für Größe.".encode("cp1252"), "It’s a “naïve” café — Übung für Größe."),
        ("Long width text ".encode("utf-32-le"), "Long width text "),
        ("Long width text ".encode("utf-32-be"), "Long width text "),
        (b"name\x00\x00value\x00\nnext\x00\n", "name value\nnext\n"),
        (b"Another fox lives in that wood.\x00 Nobody knows.\n", "Another fox lives in that wood. Nobody knows.\n"),
        ("春眠不覺曉處處聞啼鳥\n".encode("utf-16-le") * 3, "春眠不覺曉處處聞啼鳥\n" * 3),
        (b"12:00 start\x07 \x1b[32mok\x1b[0m\x0c", "12:00 start ok\n"),
        (b"an emoji \xed\xa0\xbd\xed\xb8\x80", "an emoji 😀"),
    ],
)
def test_odd_bytes(data: bytes, text: str) -> None:
    assert decode(data) == (text, [])


def test_a_few_bytes_of_no_encoding_cost_no_more_than_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legacy, "guess", lambda data: "")
    assert decode(b"ordinary \xfe words") == ("ordinary \ufffd words", ["1 character in an unknown encoding"])
    with pytest.raises(Unreadable, match="unknown encoding"):
        decode(b"\xfe\xfe\xfe\xfe words")


@pytest.mark.parametrize(
    ("declared", "wider", "text"),
    [
        ("gb2312", "gb18030", "镕"),
        ("Shift_JIS", "cp932", "①"),
        ("euc-kr", "cp949", "똠"),
        ("iso-8859-9", "cp1254", "“ı”"),
    ],
)
def test_declared_names_stand_for_what_programs_write(declared: str, wider: str, text: str) -> None:
    assert decode(text.encode(wider), declared=declared) == (text, [])

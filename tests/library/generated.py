"""Two libraries made by program, of a hundred documents in ten languages each, with planted facts and questions.

Thresholds are chosen on set A and measured on set B. They share no seed, name, topic or template, and half of the
languages.
"""

import random
from dataclasses import dataclass

_LATIN = [c + v for c in ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "br", "st") for v in "aeiou"]
SYLLABLES = {
    "latin": _LATIN,
    "cyrillic": [c + v for c in "бвгдзклмнпрст" for v in "аеиоу"],
    "greek": [c + v for c in "βγδζθκλμνπρστφχ" for v in "αεηιο"],
    "hebrew": [c + v for c in "בגדזטכלמנספקרשת" for v in "איו"],
    "arabic": ["با", "دي", "رو", "سا", "مي", "نو", "كا", "لو", "فا", "زي", "جو", "تا", "شا", "هو"],
    "devanagari": ["का", "मे", "रो", "सी", "तू", "ना", "बी", "लो", "पा", "दी", "गो", "वे", "हा", "जू"],
    "han": list("澜岳枫湛璟沁嵩铎峪霁翎漪珂郢圳晏骅蓟琅苓"),
    "katakana": list("アイウエカキクケサシスセタチツテナニヌネマミムメラリルレ"),
    "hangul": list("가나다라마바사아자차카타파하고노도로모보소조초코토포호구누두루무부"),
    "thai": ["กา", "มี", "โร", "สุ", "ทา", "นี", "บู", "ลา", "แพ", "ดี", "โม", "วี", "ชา", "ยู"],
}


@dataclass(frozen=True)
class Language:
    """topics: a topic's nouns. filler: sentences with {a}, {b}. facts: (sentence, question) with {name}, {value}.
    unrelated: questions about nothing of this."""

    script: str
    topics: tuple[str, ...]
    filler: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    unrelated: tuple[str, ...]


# Facts in everyday words, without a name, each used once in a library.
PLAIN_A = {
    "en": (
        ("Buy milk, bread and a new kettle.", "which kettles do I need to buy?"),
        ("The lynx eats two hares a week.", "What does the lynx eat?"),
        ("Our landlord allows dogs but no parrots.", "May I keep a parrot in the flat?"),
        ("The boiler was serviced by a plumber on 3 May.", "When did someone service the boiler?"),
        ("Grandmother soaked the lentils overnight before cooking.", "How long should lentils soak?"),
        ("The violin needs a new string, the thinnest one.", "What is wrong with the violin?"),
    ),
    "de": (
        ("Die Kaution beträgt drei Monatsmieten.", "Wie hoch ist die Kaution?"),
        ("Der Zahnarzt hat donnerstags geschlossen.", "An welchem Tag kann ich nicht zum Zahnarzt?"),
        ("Die Linsen müssen über Nacht quellen.", "Wie lange quellen Linsen?"),
        ("Unsere Versicherung zahlt bei Hagel, nicht bei Sturm.", "Bekomme ich nach Hagel Geld von der Versicherung?"),
    ),
    "fr": (
        ("La chaudière a été réparée par le plombier en mai.", "Qui s'est occupé de la chaudière ?"),
        ("Le chat ne mange que du poisson.", "Que mangent les chats ?"),
    ),
    "ru": (
        ("Котёл чинил сантехник третьего мая.", "Кто починил котёл?"),
        ("Бабушка замачивала чечевицу на ночь.", "Сколько надо замачивать чечевицу?"),
    ),
    "tr": (("Kedi yalnızca balık yer.", "Kediler ne yer?"),),
}
PLAIN_B = {
    "en": (
        ("Remember to water the fig tree every second day.", "How often do I have to water the figs?"),
        ("The passport expires in October.", "Until when can I use my passport?"),
        ("Refunds take ten working days after we receive the parcel.", "When do I get my refund?"),
        ("The hamster escaped twice through the broken lid.", "How did the hamster get out?"),
        ("Dinner guests: Tom is allergic to peanuts.", "Who can't eat peanuts?"),
        ("The washing machine leaks when the drum is overfilled.", "Why is the washing machine leaking?"),
    ),
    "de": (
        ("Die Waschmaschine tropft, wenn die Trommel zu voll ist.", "Warum ist die Waschmaschine undicht?"),
        ("Der Reisepass läuft im Oktober ab.", "Bis wann gilt mein Reisepass?"),
        ("Rücksendungen sind innerhalb von dreißig Tagen möglich.", "Wann muss ich eine Rücksendung abschicken?"),
        ("Den Feigenbaum nur alle zwei Tage gießen.", "Wie oft soll ich den Feigenbaum gießen?"),
    ),
    "fr": (
        ("Le passeport expire en octobre.", "Jusqu'à quand mon passeport est-il valable ?"),
        ("Le hamster s'est échappé par le couvercle cassé.", "Par où le hamster est-il sorti ?"),
    ),
    "pl": (("Paszport traci ważność w październiku.", "Do kiedy ważny jest mój paszport?"),),
    "fi": (("Passi vanhenee lokakuussa.", "Milloin passini vanhenee?"),),
}

A = {
    "en": Language(
        "latin",
        (
            "harbour crane barge tide pilot quay",
            "orchard apple graft frost beehive ladder",
            "loom thread wool dye shuttle weaver",
            "glacier moraine ice ridge valley compass",
        ),
        (
            "The {a} stood beside the {b} for most of the winter.",
            "Nobody knew whether the {a} or the {b} would be repaired first.",
            "After the storm they measured every {a} and wrote a report on each {b}.",
            "It was said that a good {a} needs a better {b}.",
        ),
        (
            ("The access code of the {name} store is {value}.", "What is the access code of the {name} store?"),
            ("Captain {name} was appointed in the year {value}.", "When was captain {name} appointed?"),
            ("The committee paid {value} crowns to {name} for repairs.", "How much did the committee pay to {name}?"),
            ("{value} lamps were delivered to the {name} warehouse.", "How many lamps did the {name} warehouse get?"),
        ),
        (
            "What is the boiling point of ethanol?",
            "Who composed the opera about the barber?",
            "How do I reset my phone?",
        ),
    ),
    "de": Language(
        "latin",
        (
            "Hafen Kran Schleuse Lotse Anker Kai",
            "Obstgarten Apfel Frost Bienenstock Leiter Ernte",
            "Webstuhl Garn Wolle Farbe Spule Meister",
        ),
        (
            "Der {a} stand den ganzen Winter neben dem {b}.",
            "Niemand wusste, ob {a} oder {b} zuerst erneuert wird.",
            "Nach dem Sturm prüften sie {a} und {b} und schrieben einen Bericht.",
        ),
        (
            ("Der Zugangscode des Lagers {name} lautet {value}.", "Wie lautet der Zugangscode für das Lager {name}?"),
            ("Kapitän {name} wurde im Jahr {value} ernannt.", "In welchem Jahr hat man Kapitän {name} ernannt?"),
            ("Der Ausschuss zahlte {value} Taler an {name}.", "Wie viele Taler hat der Ausschuss an {name} gezahlt?"),
        ),
        ("Wie hoch ist der Siedepunkt von Ethanol?", "Wer komponierte die Oper über den Barbier?"),
    ),
    "fr": Language(
        "latin",
        ("port grue péniche marée pilote quai", "verger pomme greffe gel ruche échelle", "métier fil laine teinture"),
        (
            "Tout l'hiver, {a} et {b} restèrent côte à côte.",
            "Personne ne savait si {a} ou {b} serait réparé d'abord.",
            "Après la tempête, on mesura {a} puis {b} et l'on écrivit un rapport.",
        ),
        (
            ("Le code d'accès du dépôt {name} est {value}.", "Quel est le code d'accès du dépôt {name} ?"),
            ("Le capitaine {name} fut nommé en {value}.", "Quand le capitaine {name} a-t-il été nommé ?"),
            ("Le comité versa {value} couronnes à {name}.", "Combien de couronnes le comité a-t-il versées à {name} ?"),
        ),
        ("Quelle est la température d'ébullition de l'éthanol ?", "Qui a composé l'opéra sur le barbier ?"),
    ),
    "es": Language(
        "latin",
        ("puerto grúa barcaza marea piloto muelle", "huerto manzana injerto helada colmena escalera"),
        (
            "Durante el invierno, {a} y {b} quedaron uno junto al otro.",
            "Nadie sabía si {a} o {b} se repararía primero.",
            "Tras la tormenta midieron {a} y {b} y escribieron un informe.",
        ),
        (
            ("El código de acceso del almacén {name} es {value}.", "¿Cuál es el código de acceso del almacén {name}?"),
            ("El capitán {name} fue nombrado en {value}.", "¿Cuándo nombraron al capitán {name}?"),
        ),
        ("¿Cuál es el punto de ebullición del etanol?", "¿Quién compuso la ópera del barbero?"),
    ),
    "it": Language(
        "latin",
        ("porto gru chiatta marea pilota molo", "frutteto mela innesto gelo alveare scala"),
        (
            "Per tutto l'inverno {a} e {b} rimasero vicini.",
            "Nessuno sapeva se {a} o {b} sarebbe stato riparato prima.",
            "Dopo la tempesta misurarono {a} e {b} e scrissero un rapporto.",
        ),
        (
            ("Il codice di accesso del deposito {name} è {value}.", "Qual è il codice di accesso al deposito {name}?"),
            ("Il capitano {name} fu nominato nel {value}.", "Quando è stato nominato il capitano {name}?"),
        ),
        ("Qual è il punto di ebollizione dell'etanolo?", "Chi ha composto l'opera sul barbiere?"),
    ),
    "ru": Language(
        "cyrillic",
        ("гавань кран баржа прилив лоцман причал", "сад яблоко прививка мороз улей лестница"),
        (
            "Всю зиму {a} и {b} стояли рядом.",
            "Никто не знал, починят сначала {a} или {b}.",
            "После бури они измерили {a} и {b} и написали отчёт.",
        ),
        (
            ("Код доступа к складу «{name}» — {value}.", "Какой код доступа у склада {name}?"),
            ("Капитан {name} был назначен в {value} году.", "Когда назначили капитана {name}?"),
        ),
        ("Какова температура кипения этанола?", "Кто написал оперу про цирюльника?"),
    ),
    "zh": Language(
        "han",
        ("港口 吊车 驳船 潮汐 引航员 码头", "果园 苹果 嫁接 霜冻 蜂箱 梯子"),
        (
            "整个冬天,{a}都放在{b}旁边。",
            "没有人知道先修{a}还是先修{b}。",
            "暴风雨之后,他们测量了{a}和{b},写了一份报告。",
        ),
        (
            ("{name}仓库的门禁密码是{value}。", "{name}仓库的门禁密码是多少?"),
            ("{name}船长于{value}年上任。", "{name}船长是哪一年上任的?"),
        ),
        ("乙醇的沸点是多少?", "谁创作了那部关于理发师的歌剧?"),
    ),
    "ja": Language(
        "katakana",
        ("港 起重機 はしけ 潮 水先人 岸壁", "果樹園 りんご 接ぎ木 霜 巣箱 はしご"),
        (
            "冬のあいだ{a}は{b}のそばに置かれていた。",
            "{a}と{b}のどちらを先に直すのか、誰も知らなかった。",
            "嵐の後、彼らは{a}と{b}を測り、報告書を書いた。",
        ),
        (
            ("{name}倉庫の入室コードは{value}です。", "{name}倉庫の入室コードは何ですか?"),
            ("{name}船長は{value}年に任命された。", "{name}船長はいつ任命されましたか?"),
        ),
        ("エタノールの沸点は何度ですか?", "理髪師のオペラを作曲したのは誰ですか?"),
    ),
    "ar": Language(
        "arabic",
        ("الميناء الرافعة القارب المد المرشد الرصيف", "البستان التفاح التطعيم الصقيع الخلية السلم"),
        (
            "طوال الشتاء بقي {a} بجانب {b}.",
            "لم يكن أحد يعرف هل يتم إصلاح {a} أم {b} أولا.",
            "بعد العاصفة قاسوا {a} ثم {b} وكتبوا تقريرا.",
        ),
        (
            ("رمز الدخول إلى مخزن {name} هو {value}.", "ما هو رمز الدخول إلى مخزن {name}؟"),
            ("تم تعيين القبطان {name} في عام {value}.", "متى تم تعيين القبطان {name}؟"),
        ),
        ("ما هي درجة غليان الإيثانول؟", "من ألف الأوبرا عن الحلاق؟"),
    ),
    "tr": Language(
        "latin",
        ("liman vinç mavna gelgit kılavuz rıhtım", "bahçe elma aşı don kovan merdiven"),
        (
            "Bütün kış {a} ile {b} yan yana durdu.",
            "Önce {a} mı yoksa {b} mi onarılacak kimse bilmiyordu.",
            "Fırtınadan sonra {a} ve {b} ölçüldü, bir rapor yazıldı.",
        ),
        (
            ("{name} deposunun giriş kodu {value}.", "{name} deposunun giriş kodu nedir?"),
            ("Kaptan {name} {value} yılında atandı.", "Kaptan {name} hangi yılda atanmıştı?"),
        ),
        ("Etanolün kaynama noktası kaçtır?", "Berber operasını kim besteledi?"),
    ),
}

B = {
    "en": Language(
        "latin",
        (
            "telescope mirror dome lens star catalogue",
            "bakery oven dough yeast flour apprentice",
            "railway signal tunnel ballast sleeper guard",
            "clinic nurse ward vaccine chart bandage",
        ),
        (
            "Visitors often asked about the {a}, though the {b} was older.",
            "In spring the {a} was cleaned and the {b} replaced.",
            "A letter mentions the {a} twice, and the {b} not at all.",
            "Without a {a}, the engineer wrote, no {b} lasts a decade.",
        ),
        (
            ("Professor {name} keeps {value} meteorites in a cabinet.", "How many meteorites does {name} own?"),
            ("The password for the archive at {name} is {value}.", "Which password opens the {name} archive?"),
            ("Room {value} is reserved for Doctor {name}.", "Which room has been reserved for Doctor {name}?"),
            ("The bridge at {name} is {value} metres long.", "What is the length in metres of the bridge at {name}?"),
        ),
        (
            "Which enzyme breaks down lactose?",
            "Can I freeze cooked rice?",
            "Who won the chess olympiad in Baku?",
            "How is income tax calculated for freelancers?",
        ),
    ),
    "de": Language(
        "latin",
        ("Fernrohr Spiegel Kuppel Linse Stern Katalog", "Bäckerei Ofen Teig Hefe Mehl Lehrling"),
        (
            "Besucher fragten oft nach {a}, obwohl {b} älter war.",
            "Im Frühling wurde {a} gereinigt und {b} ersetzt.",
            "Ein Brief erwähnt {a} zweimal, {b} aber nie.",
        ),
        (
            ("Professor {name} bewahrt {value} Meteoriten auf.", "Wie viele Meteoriten besitzt Professor {name}?"),
            (
                "Das Passwort für das Archiv in {name} ist {value}.",
                "Mit welchem Passwort öffnet man das Archiv {name}?",
            ),
            ("Zimmer {value} ist für Doktor {name} reserviert.", "Welches Zimmer wurde für Doktor {name} reserviert?"),
        ),
        ("Welches Enzym spaltet Laktose?", "Kann man gekochten Reis einfrieren?"),
    ),
    "fr": Language(
        "latin",
        ("télescope miroir coupole lentille étoile catalogue", "boulangerie four pâte levure farine apprenti"),
        (
            "Les visiteurs demandaient souvent {a}, pourtant {b} est plus ancien.",
            "Au printemps on nettoya {a} et on remplaça {b}.",
            "Une lettre mentionne {a} deux fois, et {b} jamais.",
        ),
        (
            ("Le professeur {name} conserve {value} météorites.", "Combien de météorites possède {name} ?"),
            ("Le mot de passe des archives de {name} est {value}.", "Quel mot de passe ouvre les archives de {name} ?"),
        ),
        ("Quelle enzyme dégrade le lactose ?", "Peut-on congeler du riz cuit ?"),
    ),
    "pt": Language(
        "latin",
        ("telescópio espelho cúpula lente estrela catálogo", "padaria forno massa fermento farinha aprendiz"),
        (
            "Os visitantes perguntavam por {a}, embora {b} fosse mais antigo.",
            "Na primavera limparam {a} e trocaram {b}.",
            "Uma carta menciona {a} duas vezes e {b} nenhuma.",
        ),
        (
            ("O professor {name} guarda {value} meteoritos.", "Quantos meteoritos tem o professor {name}?"),
            ("A senha do arquivo de {name} é {value}.", "Qual senha abre o arquivo de {name}?"),
        ),
        ("Que enzima decompõe a lactose?", "Posso congelar arroz cozido?"),
    ),
    "pl": Language(
        "latin",
        ("teleskop lustro kopuła soczewka gwiazda katalog", "piekarnia piec ciasto drożdże mąka uczeń"),
        (
            "Goście często pytali o {a}, choć {b} jest starszy.",
            "Wiosną wyczyszczono {a} i wymieniono {b}.",
            "List wspomina {a} dwa razy, a {b} ani razu.",
        ),
        (
            ("Profesor {name} przechowuje {value} meteorytów.", "Ile meteorytów ma profesor {name}?"),
            ("Hasło do archiwum {name} to {value}.", "Jakie hasło otwiera archiwum {name}?"),
        ),
        ("Jaki enzym rozkłada laktozę?", "Czy można zamrozić ugotowany ryż?"),
    ),
    "zh": Language(
        "han",
        ("望远镜 反射镜 圆顶 透镜 恒星 目录", "面包房 烤炉 面团 酵母 面粉 学徒"),
        ("参观者常常问起{a},其实{b}更古老。", "春天清洗了{a},更换了{b}。", "一封信两次提到{a},却没有提到{b}。"),
        (
            ("{name}教授收藏了{value}块陨石。", "{name}教授有多少块陨石?"),
            ("{name}档案馆的口令是{value}。", "打开{name}档案馆要用什么口令?"),
        ),
        ("哪种酶能分解乳糖?", "煮熟的米饭可以冷冻吗?"),
    ),
    "ko": Language(
        "hangul",
        ("망원경 거울 돔 렌즈 별 목록", "빵집 오븐 반죽 효모 밀가루 견습생"),
        (
            "방문객들은 {a}에 대해 자주 물었지만 {b}이 더 오래되었다.",
            "봄에 {a}을 청소하고 {b}을 바꾸었다.",
            "편지에는 {a}이 두 번 나오고 {b}은 나오지 않는다.",
        ),
        (
            ("{name} 교수는 운석 {value}개를 보관하고 있다.", "{name} 교수가 가진 운석은 몇 개입니까?"),
            ("{name} 기록관의 비밀번호는 {value}이다.", "{name} 기록관의 비밀번호는 무엇입니까?"),
        ),
        ("유당을 분해하는 효소는 무엇입니까?", "익힌 쌀을 얼려도 됩니까?"),
    ),
    "th": Language(
        "thai",
        ("กล้องดูดาว กระจก โดม เลนส์ ดาวฤกษ์ บัญชี", "ร้านขนมปัง เตาอบ แป้งโด ยีสต์ แป้งสาลี ลูกมือ"),
        (
            "ผู้มาเยือนมักถามถึง{a}ทั้งที่{b}เก่าแก่กว่า",
            "ในฤดูใบไม้ผลิมีการทำความสะอาด{a}และเปลี่ยน{b}",
            "จดหมายกล่าวถึง{a}สองครั้งแต่ไม่เคยกล่าวถึง{b}",
        ),
        (
            ("ศาสตราจารย์{name}เก็บอุกกาบาตไว้ {value} ก้อน", "ศาสตราจารย์{name}มีอุกกาบาตกี่ก้อน"),
            ("รหัสผ่านของหอจดหมายเหตุ{name}คือ {value}", "รหัสผ่านของหอจดหมายเหตุ{name}คืออะไร"),
        ),
        ("เอนไซม์ใดย่อยแล็กโทส", "ข้าวสุกแช่แข็งได้ไหม"),
    ),
    "hi": Language(
        "devanagari",
        ("दूरबीन दर्पण गुंबद लेंस तारा सूची", "बेकरी भट्ठी आटा खमीर मैदा शागिर्द"),
        (
            "लोग अक्सर {a} के बारे में पूछते थे, जबकि {b} पुराना है।",
            "वसंत में {a} साफ किया गया और {b} बदला गया।",
            "एक पत्र में {a} दो बार आता है, {b} एक बार भी नहीं।",
        ),
        (
            ("प्रोफेसर {name} के पास {value} उल्कापिंड हैं।", "प्रोफेसर {name} के पास कितने उल्कापिंड हैं?"),
            ("{name} अभिलेखागार का पासवर्ड {value} है।", "{name} अभिलेखागार का पासवर्ड क्या है?"),
        ),
        ("कौन सा एंजाइम लैक्टोज को तोड़ता है?", "क्या पके चावल को जमा सकते हैं?"),
    ),
    "fi": Language(
        "latin",
        ("kaukoputki peili kupoli linssi tähti luettelo", "leipomo uuni taikina hiiva jauho oppipoika"),
        (
            "Kävijät kysyivät usein, onko {a} vanhempi kuin {b}.",
            "Keväällä {a} puhdistettiin ja {b} vaihdettiin.",
            "Kirje mainitsee, että {a} on rikki, mutta {b} ei ole.",
        ),
        (
            ("Professori {name} säilyttää {value} meteoriittia.", "Montako meteoriittia professori {name} omistaa?"),
            ("Arkiston {name} salasana on {value}.", "Millä salasanalla arkisto {name} aukeaa?"),
        ),
        ("Mikä entsyymi hajottaa laktoosia?", "Voiko keitettyä riisiä pakastaa?"),
    ),
}


@dataclass(frozen=True)
class Question:
    """document: the number of the one that answers it; None where none does."""

    text: str
    document: int | None
    language: str


@dataclass(frozen=True)
class Generated:
    texts: list[str]
    questions: list[Question]


def generate(
    languages: dict[str, Language],
    plain: dict[str, tuple[tuple[str, str], ...]],
    *,
    seed: int,
    documents: int = 100,
    facts: int = 2,
) -> Generated:
    """Documents of 3 to 200 sentences, and questions: on each fact, and half as many on none of them. Two thirds of
    these ask in the words of a fact about a name that is nowhere; the others ask something else altogether."""
    draw, used = random.Random(seed), set[str]()
    texts, questions = list[str](), list[Question]()
    everyday = {code: draw.sample(pairs, len(pairs)) for code, pairs in plain.items()}
    for number in range(documents):
        code = list(languages)[number % len(languages)]
        spoken = languages[code]
        sentences = _filler(draw, spoken, draw.choice((3, 8, 20, 60, 200)))
        for place in draw.sample(range(len(sentences)), facts):
            if everyday.get(code) and draw.random() < 0.5:
                sentences[place], asked = everyday[code].pop()
                questions.append(Question(asked, number, code))
                continue
            statement, question = draw.choice(spoken.facts)
            name = _name(draw, spoken, used)
            sentences[place] = statement.format(name=name, value=draw.randint(100, 9999))
            questions.append(Question(question.format(name=name), number, code))
        texts.append(_paragraphs(spoken, sentences))
    for number in range(documents * facts // 2):
        code = draw.choice(list(languages))
        spoken = languages[code]
        _, question = draw.choice(spoken.facts)
        asked = draw.choice(spoken.unrelated) if number % 3 == 2 else question.format(name=_name(draw, spoken, used))
        questions.append(Question(asked, None, code))
    return Generated(texts, questions)


def _filler(draw: random.Random, spoken: Language, count: int) -> list[str]:
    nouns = draw.choice(spoken.topics).split()
    return [draw.choice(spoken.filler).format(a=draw.choice(nouns), b=draw.choice(nouns)) for _ in range(count)]


def _paragraphs(spoken: Language, sentences: list[str]) -> str:
    space = "" if spoken.script in ("han", "katakana") else " "
    groups = [sentences[i : i + 5] for i in range(0, len(sentences), 5)]
    return "\n\n".join(space.join(group) for group in groups)


def _name(draw: random.Random, spoken: Language, used: set[str]) -> str:
    while True:
        name = "".join(draw.choices(SYLLABLES[spoken.script], k=2 if spoken.script == "han" else 3)).title()
        if name not in used:
            used.add(name)
            return name

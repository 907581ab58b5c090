"""A third library made by program, in ten other languages and scripts: no threshold was chosen on it."""

from dataclasses import replace

from tests.library.generated import Language

PLAIN_C = {
    "vi": (
        ("Vé tàu đã được giấu trong ngăn kéo dưới cùng.", "Vé tàu nằm ở đâu?"),
        ("Bà ngoại dị ứng với tôm và cua.", "Ai bị dị ứng với tôm?"),
    ),
    "el": (
        ("Ο υδραυλικός άλλαξε τη βρύση της κουζίνας την Τρίτη.", "Πότε άλλαξε η βρύση της κουζίνας;"),
        ("Η γάτα κοιμάται μόνο πάνω στο ψυγείο.", "Πού κοιμάται η γάτα;"),
    ),
    "uk": (
        ("Сусід позичив драбину до кінця серпня.", "До якого часу сусід позичив драбину?"),
        ("Насіння гарбуза треба висівати у травні.", "Коли висівати гарбуз?"),
    ),
    "hu": (
        ("A macska csak a piros takarón alszik.", "Min alszik a macska?"),
        ("A kazánt október elején kell ellenőriztetni.", "Mikor kell ellenőriztetni a kazánt?"),
    ),
    "id": (
        ("Kunci gudang disimpan di bawah pot bunga.", "Di mana kunci gudang disimpan?"),
        ("Kakek hanya minum teh jahe tanpa gula.", "Apa yang diminum kakek?"),
    ),
    "ko": (("냉장고 문이 고장 나서 화요일에 수리 기사가 온다.", "냉장고 수리 기사는 언제 오나요?"),),
    "ar": (("انتهت صلاحية جواز السفر في شهر أكتوبر.", "متى تنتهي صلاحية جواز السفر؟"),),
    "hi": (("दादी की दवा नीली अलमारी में रखी है।", "दादी की दवा कहाँ रखी है?"),),
    "th": (("กุญแจห้องเก็บของอยู่ใต้กระถางต้นไม้", "กุญแจห้องเก็บของอยู่ที่ไหน"),),
}

C = {
    "th": Language(
        "thai",
        ("โรงสี ข้าว เครื่องจักร กระสอบ คลอง ท่าน้ำ", "สวนยาง ต้นกล้า ปุ๋ย ฝน รถกระบะ คนงาน"),
        (
            "หลายปีที่ผ่านมา {a} ตั้งอยู่ใกล้กับ {b} มาตลอด",
            "ชาวบ้านเล่าว่า {a} เก่ากว่า {b} ที่เห็นอยู่ตอนนี้",
            "เมื่อฝนหยุดตก เขาจึงออกไปดู {a} แล้วจดเรื่อง {b} ไว้ในสมุด",
        ),
        (
            ("ร้าน{name}ขายเรือไปทั้งหมด {value} ลำ", "ร้าน{name}ขายเรือไปกี่ลำ"),
            ("หมายเลขตู้ของคุณ{name}คือ {value}", "ตู้ของคุณ{name}หมายเลขอะไร"),
            ("เขื่อน{name}สร้างเสร็จในปี {value}", "เขื่อน{name}สร้างเสร็จเมื่อไร"),
        ),
        ("ดาวพุธมีดวงจันทร์กี่ดวง", "วิธีทำขนมเค้กช็อกโกแลตต้องใช้อะไรบ้าง", "ใครเป็นผู้คิดค้นโทรศัพท์"),
    ),
    "hi": Language(
        "devanagari",
        ("चक्की अनाज बोरी नहर घाट पहिया", "बाग़ आम पौधा खाद बारिश मज़दूर"),
        (
            "कई सालों तक {a} और {b} एक ही आँगन में रहे।",
            "गाँव वाले कहते हैं कि {a} पुराना है और {b} नया।",
            "बारिश रुकने पर उन्होंने {a} को देखा और {b} के बारे में लिखा।",
        ),
        (
            ("{name} की दुकान से {value} नावें बिकीं।", "{name} की दुकान से कितनी नावें बिकीं?"),
            ("श्री {name} की तिजोरी का नंबर {value} है।", "श्री {name} की तिजोरी का नंबर क्या है?"),
            ("{name} बाँध सन {value} में पूरा हुआ।", "{name} बाँध कब पूरा हुआ?"),
        ),
        ("बुध ग्रह के कितने चंद्रमा हैं?", "चॉकलेट केक बनाने में क्या लगता है?", "टेलीफ़ोन का आविष्कार किसने किया?"),
    ),
    "ar": Language(
        "arabic",
        ("الطاحونة القمح الكيس القناة المرسى العجلة", "البستان الزيتون الشتلة السماد المطر العامل"),
        (
            "لسنوات عديدة كان {a} قريبا من {b}.",
            "يقول أهل القرية إن {a} أقدم من {b}.",
            "عندما توقف المطر خرجوا لرؤية {a} وكتبوا عن {b} في الدفتر.",
        ),
        (
            ("باع متجر {name} {value} قاربا.", "كم قاربا باع متجر {name}؟"),
            ("رقم خزانة السيد {name} هو {value}.", "ما رقم خزانة السيد {name}؟"),
            ("اكتمل بناء سد {name} سنة {value}.", "متى اكتمل بناء سد {name}؟"),
        ),
        ("كم قمرا لكوكب عطارد؟", "ما مكونات كعكة الشوكولاتة؟", "من اخترع الهاتف؟"),
    ),
    "ko": Language(
        "hangul",
        ("방앗간 쌀 기계 자루 수로 나루터", "과수원 묘목 비료 비 트럭 일꾼"),
        (
            "여러 해 동안 {a} 옆에는 {b} 하나가 있었다.",
            "마을 사람들은 {a}보다 {b}이 더 오래되었다고 말한다.",
            "비가 그치자 그들은 {a} 쪽으로 나가 {b}에 대해 공책에 적었다.",
        ),
        (
            ("{name} 상점은 배를 {value}척 팔았다.", "{name} 상점은 배를 몇 척 팔았나요?"),
            ("{name} 씨의 사물함 번호는 {value}번이다.", "{name} 씨의 사물함은 몇 번인가요?"),
            ("{name} 댐은 {value}년에 완공되었다.", "{name} 댐은 언제 완공되었나요?"),
        ),
        ("수성에는 위성이 몇 개 있나요?", "초콜릿 케이크를 만들려면 무엇이 필요한가요?", "전화기는 누가 발명했나요?"),
    ),
    "vi": Language(
        "latin",
        ("cối_xay lúa máy bao kênh bến", "vườn cam giống phân mưa thợ"),
        (
            "Suốt nhiều năm {a} luôn nằm cạnh {b}.",
            "Dân làng kể rằng {a} cũ hơn {b} bây giờ.",
            "Khi trời tạnh, họ ra xem {a} rồi ghi lại chuyện {b} vào sổ.",
        ),
        (
            ("Cửa hàng {name} đã bán {value} chiếc thuyền.", "Cửa hàng {name} đã bán bao nhiêu chiếc thuyền?"),
            ("Tủ của ông {name} mang số {value}.", "Tủ của ông {name} số mấy?"),
            ("Đập {name} hoàn thành năm {value}.", "Đập {name} hoàn thành khi nào?"),
        ),
        ("Sao Thủy có mấy mặt trăng?", "Làm bánh sô cô la cần những gì?", "Ai phát minh ra điện thoại?"),
    ),
    "el": Language(
        "greek",
        ("μύλος σιτάρι σακί κανάλι μόλος τροχός", "ελαιώνας δεντράκι λίπασμα βροχή φορτηγό εργάτης"),
        (
            "Για πολλά χρόνια {a} και {b} ήταν στην ίδια αυλή.",
            "Στο χωριό λένε πως {a} είναι πιο παλιό από {b}.",
            "Όταν σταμάτησε η βροχή, είδαν {a} και έγραψαν για {b} στο τετράδιο.",
        ),
        (
            ("Το κατάστημα {name} πούλησε {value} βάρκες.", "Πόσες βάρκες πούλησε το κατάστημα {name};"),
            ("Το ντουλάπι του κυρίου {name} έχει αριθμό {value}.", "Τι αριθμό έχει το ντουλάπι του κυρίου {name};"),
            ("Το φράγμα {name} τελείωσε το {value}.", "Πότε τελείωσε το φράγμα {name};"),
        ),
        (
            "Πόσα φεγγάρια έχει ο Ερμής;",
            "Τι χρειάζεται για ένα κέικ σοκολάτας;",
            "Ποιος εφηύρε το τηλέφωνο;",
        ),
    ),
    "uk": Language(
        "cyrillic",
        ("млин зерно мішок канал причал колесо", "сад саджанець добриво дощ вантажівка робітник"),
        (
            "Багато років {a} і {b} були в одному дворі.",
            "У селі кажуть, що {a} старіше, ніж {b}.",
            "Коли дощ ущух, вони оглянули {a} і записали про {b} у зошит.",
        ),
        (
            ("Крамниця {name} продала {value} човнів.", "Скільки човнів продала крамниця {name}?"),
            ("Шафка пана {name} має номер {value}.", "Який номер має шафка пана {name}?"),
            ("Греблю {name} добудували {value} року.", "Коли добудували греблю {name}?"),
        ),
        (
            "Скільки супутників у Меркурія?",
            "Що потрібно для шоколадного торта?",
            "Хто винайшов телефон?",
        ),
    ),
    "hu": Language(
        "latin",
        ("malom búza zsák csatorna móló kerék", "gyümölcsös csemete trágya eső teherautó munkás"),
        (
            "Sok éven át {a} és {b} ugyanabban az udvarban állt.",
            "A faluban azt mondják, hogy {a} régebbi, mint {b}.",
            "Amikor elállt az eső, megnézték: {a}, majd {b} is bekerült a füzetbe.",
        ),
        (
            ("A(z) {name} bolt {value} csónakot adott el.", "Hány csónakot adott el a(z) {name} bolt?"),
            ("{name} úr szekrénye a {value}-es számot viseli.", "Milyen számot visel {name} úr szekrénye?"),
            ("A {name} gát {value}-ben készült el.", "Mikor készült el a {name} gát?"),
        ),
        (
            "Hány holdja van a Merkúrnak?",
            "Mi kell egy csokoládétortához?",
            "Ki találta fel a telefont?",
        ),
    ),
    "he": Language(
        "hebrew",
        ("טחנה חיטה שק תעלה מזח גלגל", "פרדס שתיל דשן גשם משאית פועל"),
        (
            "שנים רבות היו {a} ועוד {b} באותה חצר.",
            "בכפר מספרים כי {a} עתיק יותר מאשר {b}.",
            "כאשר פסק הגשם יצאו לראות {a} וכתבו על {b} במחברת.",
        ),
        (
            ("חנות {name} מכרה {value} סירות.", "כמה סירות מכרה חנות {name}?"),
            ("מספר הארונית של מר {name} הוא {value}.", "מה מספר הארונית של מר {name}?"),
            ("הסכר {name} הושלם בשנת {value}.", "מתי הושלם הסכר {name}?"),
        ),
        ("כמה ירחים יש לכוכב חמה?", "מה צריך כדי לאפות עוגת שוקולד?", "מי המציא את הטלפון?"),
    ),
    "id": Language(
        "latin",
        ("penggilingan padi karung kanal dermaga roda", "kebun bibit pupuk hujan truk buruh"),
        (
            "Bertahun-tahun {a} dan {b} berada di halaman yang sama.",
            "Orang desa berkata bahwa {a} lebih tua daripada {b}.",
            "Ketika hujan reda, mereka memeriksa {a} lalu mencatat {b} di buku.",
        ),
        (
            ("Toko {name} menjual {value} perahu.", "Berapa perahu yang dijual toko {name}?"),
            ("Loker Pak {name} bernomor {value}.", "Nomor berapa loker Pak {name}?"),
            ("Bendungan {name} selesai pada tahun {value}.", "Kapan bendungan {name} selesai?"),
        ),
        (
            "Berapa bulan yang dimiliki Merkurius?",
            "Apa saja bahan kue cokelat?",
            "Siapa yang menemukan telepon?",
        ),
    ),
}

# Facts whose names have an ending or a letter before them that they do not have in the question.
INFLECTED = {
    "uk": (
        ("У {name}ві тримають {value} човнів.", "Скільки човнів тримають біля {name}ва?"),
        ("Лист від пані {name}ни прийшов {value} числа.", "Якого числа прийшов лист пані {name}ні?"),
    ),
    "hu": (
        ("{name}ban {value} csónak áll.", "Hány csónak áll {name} kikötőjében?"),
        ("{name}nak {value} forintot fizettek.", "Mennyi forintot kapott {name}?"),
    ),
    "ar": (
        ("يوجد ب{name} {value} قاربا.", "كم قاربا يوجد في {name}؟"),
        ("دفعوا ل{name} مبلغ {value} دينار.", "كم دفعوا إلى {name}؟"),
    ),
    "he": (
        ("ב{name} יש {value} סירות.", "כמה סירות יש ליד {name}?"),
        ("שילמו ל{name} סך {value} שקלים.", "כמה שילמו אל {name}?"),
    ),
    "ko": (
        ("{name}에서 배 {value}척을 보관한다.", "{name}의 배는 몇 척인가요?"),
        ("{name}에게 {value}원을 주었다.", "{name}은 얼마를 받았나요?"),
    ),
    "el": (
        ("Στη {name}ς φυλάνε {value} βάρκες.", "Πόσες βάρκες φυλάνε στη {name};"),
        ("Η κυρία {name}ου πήρε {value} ευρώ.", "Πόσα ευρώ πήρε η {name};"),
    ),
    "hi": (
        ("{name} में {value} नावें रखी हैं।", "{name} वाली नावें कितनी हैं?"),
        ("{name} को {value} रुपये दिए गए।", "{name} ने कितने रुपये पाए?"),
    ),
    "th": (
        ("ที่{name}มีเรือ {value} ลำ", "เรือที่{name}มีกี่ลำ"),
        ("จ่ายให้{name} {value} บาท", "{name}ได้รับเงินกี่บาท"),
    ),
    "vi": (
        ("Ở {name} có {value} chiếc thuyền.", "Có mấy chiếc thuyền tại {name}?"),
        ("Người ta trả cho {name} {value} đồng.", "{name} nhận được bao nhiêu đồng?"),
    ),
    "id": (
        ("Di {name}nya ada {value} perahu.", "Ada berapa perahu di {name}?"),
        ("{name} dibayar {value} rupiah.", "Berapa rupiah pembayaran {name}?"),
    ),
}
C_INFLECTED = {code: replace(spoken, facts=INFLECTED[code]) for code, spoken in C.items()}

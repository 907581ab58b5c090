"""Words with which questions are asked, not what they are about: they tell little about where the answer is.

Interrogatives, articles, pronouns, prepositions and forms of "to be", "to have" and "to do", by language. For scripts
without spaces, the pieces of such words.
"""

from functools import cache

from ..core.words import words

_BY_LANGUAGE = {
    "ar": "ما ماذا من متى أين كيف كم لماذا هل هو هي هذا هذه في على إلى عن مع التي الذي كان كانت أي لدى عند",
    "cs": "co kdo kdy kde jak jaký jaká jaké který která které kolik proč je jsou byl byla bylo v na do z od pro s a",
    "da": "hvad hvem hvornår hvor hvordan hvilken hvilket hvilke hvorfor er var har en et den det de i på til fra "
    "af og",
    "de": "was wer wen wem wann wo wohin woher wie welche welcher welches welchen wieviel warum ist sind war waren "
    "hat haben wird wurde der die das den dem des ein eine einen einem einer und oder in im am an auf aus bei "
    "von vom zu zum zur mit für nach über um heißt lautet gibt es",
    "el": "τι ποιος ποια ποιο πότε πού πως πώς πόσο πόσα γιατί είναι ήταν έχει ο η το οι τα του της των τον την σε "
    "στο στη στην από για με και",
    "en": "what who whom whose when where which why how much many is are was were be been do does did has have had "
    "can could will would should a an the of in on at to for from by with about into and or it its this that "
    "these those there they he she his her their i you we my your our me as not tell according text document",
    "es": "qué quién quiénes cuándo dónde cómo cuál cuáles cuánto cuánta cuántos cuántas por es son era fue está "
    "hay tiene el la los las un una de del en a al con para y o se su que lo",
    "fi": "mikä mitä mitkä kuka kenen milloin missä mistä mihin miten kuinka monta paljon miksi on ovat oli ja tai "
    "se millä minkä kuka",
    "fr": "que quoi qui quand où comment quel quelle quels quelles combien pourquoi est sont était ont a le la les "
    "un une des du de d l dans en sur à au aux par pour avec et ou se s il elle ce cette qu c",
    "he": "מה מי מתי איפה היכן איך כמה למה מדוע האם איזה איזו הוא היא של את על אל עם זה זו היה",
    "hi": "क्या कौन कब कहाँ कहां कैसे कितना कितने कितनी क्यों किस किसने कौनसा है हैं था थी थे का की के को में से पर ने और",
    "hu": "mi ki mikor hol hova hogyan melyik mennyi hány miért van volt a az egy és ban ben",
    "id": "apa siapa kapan mana dimana bagaimana berapa mengapa adalah yang di ke dari pada untuk dengan dan itu ini",
    "it": "che cosa chi quando dove come quale quali quanto quanta quanti quante perché è sono era ha il lo la i "
    "gli le un una di del della dello dei delle in nel nella a al alla da dal dalla con per su e si qual",
    "ja": "何 なに 何ですか ですか ますか でしたか いつ どこ どこですか 誰 だれ どの どれ "
    "いくつ いくら なぜ どのように とは は何 のは は誰 はいつ はどこ する します した "
    "この その",
    "ko": "무엇 무엇입니까 무엇인가요 입니까 인가요 누구 누구입니까 언제 언제입니까 어디 "
    "어디입니까 어떻게 얼마 왜 어느 어떤 몇 은 는 이 가 을 를 의 에 에서",
    "nl": "wat wie wanneer waar hoe welke welk hoeveel waarom is zijn was heeft de het een van in op te aan met "
    "voor en",
    "no": "hva hvem når hvor hvordan hvilken hvilket hvorfor er var har en ei et den det i på til fra av og",
    "pl": "co kto kiedy gdzie jak jaki jaka jakie który która które ile dlaczego jest są był była było w na do z od "
    "o i",
    "pt": "o que quem quando onde como qual quais quanto quanta quantos quantas por é são era foi está tem a os as "
    "um uma de do da dos das em no na nos nas ao à com para e se",
    "ro": "ce cine când unde cum care cât câtă câți câte de este sunt era are un o la în din pe cu pentru și al a",
    "ru": "что кто кого когда где куда как какой какая какое какие каков какова сколько почему чей это есть был "
    "была было были в на к с со из от для по у о об и или ли называется",
    "sv": "vad vem när var hur vilken vilket vilka varför är var har en ett den det de i på till från av för med och",
    "th": "อะไร คืออะไร ใคร เมื่อไหร่ เมื่อไร ที่ไหน ไหน อย่างไร เท่าไหร่ เท่าไร ทำไม กี่ เป็น คือ มี ของ ที่ ใน และ",
    "tr": "ne nedir kim kimdir ne zaman nerede nereye nasıl hangi hangisi kaç neden niçin mi mı mu mü bir ve bu şu ile",
    "uk": "що хто кого коли де куди як який яка яке які скільки чому чий це є був була було були в на до з із від "
    "для у",
    "vi": "gì ai khi nào đâu như thế bao nhiêu tại sao là của ở trong và có cái một các những được cho",
    "zh": "什么 是什么 谁 是谁 什么时候 何时 哪里 在哪里 哪个 哪一 怎么 如何 多少 是多少 "
    "为什么 几个 吗 的 是 在 了 什麼 是什麼 誰 什麼時候 哪裡 哪個 怎麼 多少 為什麼 "
    "幾個 嗎",
}


@cache
def question_words() -> frozenset[str]:
    return frozenset(word for listed in _BY_LANGUAGE.values() for item in listed.split() for word in words(item))

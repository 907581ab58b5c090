"""Values of a workbook's cells as a reader would write them."""

import re
from datetime import date, datetime, time, timedelta
from functools import lru_cache

_LITERAL = re.compile(r'"([^"]*)"|\\(.)|\[\$([^\]-]*)[^\]]*\]|\[[^\]]*\]|[_*].')
_NUMBER = re.compile(r"[#0?](?:[#0?,./ ]*[#0?])?(?:E[+-]0+)?,*")


def shown(value: object, number_format: str) -> str:
    """Whole numbers without a point, per cent as such, ISO dates; with the unit or currency of the format."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, int | float):
        return _number(value, number_format or "")
    if isinstance(value, datetime):
        midnight = value.time() == time()
        return value.date().isoformat() if midnight else f"{value.date().isoformat()} {_time(value.time())}"
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, time):
        return _time(value)
    if isinstance(value, timedelta):
        minutes, seconds = divmod(round(value.total_seconds()), 60)
        return f"{minutes // 60}:{minutes % 60:02}" + (f":{seconds:02}" if seconds else "")
    return str(value)


def _time(value: time) -> str:
    return value.isoformat("seconds" if value.second else "minutes")


def _number(value: int | float, number_format: str) -> str:
    if "%" in number_format:
        return f"{value * 100:.10g}%"
    before, digits, after = _parts(number_format)
    if digits and isinstance(value, int) and value >= 0:
        return f"{before}{value:0{digits}}{after}"
    plain = format(value, ".15g") if isinstance(value, float) else str(value)
    return f"{before}{plain}{after}"


@lru_cache(1000)
def _parts(number_format: str) -> tuple[str, int, str]:
    """What a format puts before and after a number, such as a currency, and to how many digits it fills zeros."""
    literals: list[str] = []

    def kept(match: re.Match[str]) -> str:
        literals.append(match[1] or match[2] or match[3] or "")
        return chr(0xE000 + len(literals) - 1)  # a sign that no format has, until the number is found

    section = _LITERAL.sub(kept, number_format[:200]).partition(";")[0]
    number = _NUMBER.search(section)
    if number is None or re.search("[a-zA-Z@]", section.replace(number[0], "")):
        return "", 0, ""
    before, after = (
        "".join(literals[ord(sign) - 0xE000] if sign >= "\ue000" else sign for sign in part)
        for part in (section[: number.start()], section[number.end() :])
    )
    digits = len(number[0]) if re.fullmatch("0{2,20}", number[0]) else 0
    return before.strip("()") if before.strip() else "", digits, after.strip("()") if after.strip() else ""

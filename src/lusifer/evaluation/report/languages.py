"""English names of languages, by the codes that results use."""

from __future__ import annotations

# Two letters or three; codes of dialects and of macrolanguages beside the language's own.
_NAMES = """
am amh Amharic|ar ara arb Arabic|acm Mesopotamian Arabic|apc Levantine Arabic|ars Najdi Arabic|ary Moroccan Arabic
arz Egyptian Arabic|af afr Afrikaans|as asm Assamese|az aze azj Azerbaijani|bm bam Bambara|be bel Belarusian
bn ben Bengali|bo bod Tibetan|bs bos Bosnian|bg bul Bulgarian|ca cat Catalan|ceb Cebuano|cs ces Czech
ckb Central Kurdish|cy cym Welsh|da dan Danish|de deu German|el ell Greek|en eng English|eo epo Esperanto
es spa Spanish|et est Estonian|eu eus Basque|fa fas pes Persian|fi fin Finnish|fil Filipino|fr fra French|ga gle Irish
gd gla Scottish Gaelic|gl glg Galician|gn grn Guarani|gu guj Gujarati|ha hau Hausa|he heb Hebrew|hi hin Hindi
hr hrv Croatian|ht hat Haitian Creole|hu hun Hungarian|hy hye Armenian|id ind Indonesian|ig ibo Igbo|ilo Ilocano
is isl Icelandic|it ita Italian|ja jpn Japanese|jv jav Javanese|ka kat Georgian|kk kaz Kazakh|km khm Khmer
kn kan Kannada|ko kor Korean|ku kur kmr Kurdish|ky kir Kyrgyz|la lat Latin|lb ltz Luxembourgish|lg lug Luganda
ln lin Lingala|lo lao Lao|lt lit Lithuanian|luo Luo|lv lav lvs Latvian|mg mlg plt Malagasy|mi mri Maori
mk mkd Macedonian|ml mal Malayalam|mn mon khk Mongolian|mr mar Marathi|ms msa zsm Malay|mt mlt Maltese|my mya Burmese
nb nob Norwegian Bokmål|ne nep npi Nepali|nl nld Dutch|nn nno Norwegian Nynorsk|no nor Norwegian|nso Northern Sotho
ny nya Chichewa|oc oci Occitan|om orm gaz Oromo|or ori ory Odia|pa pan Punjabi|pl pol Polish|ps pus pbt Pashto
pt por Portuguese|qu quy Quechua|rn run Rundi|ro ron Romanian|ru rus Russian|rw kin Kinyarwanda|sd snd Sindhi
si sin Sinhala|sk slk Slovak|sl slv Slovenian|sn sna Shona|so som Somali|sq sqi als Albanian|sr srp Serbian
ss ssw Swati|st sot Southern Sotho|su sun Sundanese|sv swe Swedish|sw swa swh Swahili|ta tam Tamil|te tel Telugu
tg tgk Tajik|th tha Thai|ti tir Tigrinya|tk tuk Turkmen|tl tgl Tagalog|tn tsn Tswana|tr tur Turkish|ts tso Tsonga
tt tat Tatar|tw twi Twi|ug uig Uyghur|uk ukr Ukrainian|ur urd Urdu|uz uzb uzn Uzbek|vi vie Vietnamese|war Waray
wo wol Wolof|xh xho Xhosa|yi yid ydd Yiddish|yo yor Yoruba|yue Cantonese|zh zho cmn Chinese|zu zul Zulu
"""


def _table() -> dict[str, str]:
    table: dict[str, str] = {}
    for entry in _NAMES.replace("\n", "|").strip("|").split("|"):
        words = entry.split()
        codes = [word for word in words if word.islower()]
        table |= dict.fromkeys(codes, " ".join(words[len(codes) :]))
    return table


_TABLE = _table()


def language_name(code: str) -> str:
    """A language as readers know it, with its code; the code alone where the name is not known.

    Args:
        code: As in results: ``te``, ``tel`` or, with its script, ``tel-Telu``.
    """
    name = _TABLE.get(code.partition("-")[0])
    return f"{name} ({code})" if name else code

"""Names, places and sentence frames of the synthetic bank messages. All of them are invented.

Frames use the template syntax of `phrases.py`, plus `[a.says]` for a clause about the subject of the message and
`[b.topic]` for one about another subject that is only mentioned.
"""

from __future__ import annotations


def _items(text: str, separator: str = " ") -> tuple[str, ...]:
    return tuple(text.split(separator))


FIRST_NAMES = _items(
    "Ada Adil Agnes Aiko Amara Anders Anita Anton Beatriz Ben Bianca Bilal Carla Chidi Clara Dario Dilek Dmitri Elif "
    "Elena Emeka Emil Erik Esther Farah Felix Fiona Gita Greta Hana Hassan Helen Hugo Ines Ivan Jamal Jana Jonas Joyce "
    "Karim Kavya Kofi Lars Leila Lena Liam Lin Lucia Magnus Maja Marco Mei Milan Mina Nadia Nia Noah Nora Olga Omar "
    "Oscar Paula Pedro Priya Rafael Rania Rosa Ruth Samir Sara Selma Sofia Stefan Tariq Tess Theo Thuy Tomas Uma Vera "
    "Viktor Wanda Wei Yara Yusuf Zoe"
)
SURNAME_STARTS = _items(
    "Alder Bram Brock Calder Cold Dun Ember Fair Fen Gar Glen Hal Harrow Hollow Ivel Kel Lang Lin Marl Mor Nether Oak "
    "Pell Quar Rad Rowan Sel Stan Tarn Thorn Umber Val Wald Wether Win Yarl"
)
SURNAME_ENDS = _items(
    "by combe den dale ford grave ham holm hurst ley mere mont ner rick ridge sen shaw stead vale wick"
)

MERCHANTS = _items(
    "Bluefern Books|Kettle and Pine|Marlowe Grocers|Tiny Anchor Cafe|Northlamp Electronics|Oakmoor Garden Centre|"
    "Velvet Otter Fashion|Quickspoon Delivery|Pebble Fitness|Sunhatch Travel|Copper Finch Bakery|Lumo Cinema|"
    "Driftwood Toys|Hexley Hardware|Green Ladder Pharmacy|Paperkite Stationery|Brightwheel Bikes|Fernway Petrol|"
    "Moonbarn Furniture|Saltbox Seafood|Tallow Street Market|Zigzag Shoes",
    "|",
)
TOWNS = _items(
    "Arlow Brenmouth Carrowby Dunmere Eastholt Fallowick Grenby Harnstead Islemont Lowdale Pellham Thornwick"
)
STREETS = _items(
    "Mill Lane|Chestnut Row|Harbour Street|Station Road|Lime Avenue|Kiln Yard|Meadow Close|Old Ferry Road|Tower Hill|"
    "Weaver Street|Orchard Way|Rope Walk",
    "|",
)
COUNTRIES = (
    ("Norway", "kroner"),
    ("Japan", "yen"),
    ("Poland", "zloty"),
    ("Turkey", "lira"),
    ("India", "rupees"),
    ("Kenya", "shillings"),
    ("Brazil", "reais"),
    ("Canada", "dollars"),
    ("Mexico", "pesos"),
    ("Switzerland", "francs"),
    ("Thailand", "baht"),
    ("Morocco", "dirhams"),
)
MONTHS = _items("January February March April May June July August September October November December")
SERVICES = _items(
    "a paper statement|one cash withdrawal|a single transfer|a new card|a phone call|an account overview|"
    "a returned direct debit|an urgent payment",
    "|",
)

RELATIVES = _items("sister brother mother father son daughter cousin landlord neighbour plumber")
DAYS = _items("three days|five days|two weeks|a week|ten days|almost a month", "|")
ERRORS = ("E-204", "E-31", "4017", "AUTH-9", "502", "E-77")

HELP = (
    "(can|could) you help (me with this|)?",
    "what (should|can) I do?",
    "please (advise|look into it|get back to me)",
    "what happens now?",
    "please call me on {phone}",
    "who can help me with this?",
    "I would be glad of a quick answer",
    "how do we go on from here?",
)

PLAIN = (
    ("[a.says]. [a.asks]", 9),
    ("[a.says]. [help]", 5),
    ("[a.says]", 5),
    ("[a.topic]: [a.asks]", 2),
    ("I (am writing|have a question) about [a.topic]. [help]", 2),
    ("[a.asks] [a.says]", 2),
)

PASSING = (
    ("[b.settled], (thanks|thank you), but (now |)[a.says]", 5),
    ("[a.says]. [a.asks] (By the way, |)[b.settled]", 3),
    ("[a.says]. [help] [b.settled], thanks for that", 2),
    ("(as for|about) [b.topic]: that is (settled|sorted|done). [a.says]", 3),
    ("{whenever} I told you that [b.says]. That is (sorted|over|dealt with). Now [a.says]", 3),
    ("while I was [b.doing], something else came up: [a.says]", 3),
    ("I was [b.doing] {when}. Different matter: [a.says]", 2),
    ("I thought this was about [b.topic], but no: [a.says]", 2),
)

CONTRAST = (
    ("(this is not|I am not writing) about [b.topic] (this time|), (it is|but) about [a.topic]. [help]", 4),
    ("(this is|I am writing) about [a.topic], not (about |)[b.topic]. [help]", 4),
    ("please (ignore|forget) my message about [b.topic]. I only need help with [a.topic]", 3),
    ("you answered about [b.topic], but I had asked about [a.topic]", 3),
    ("you keep telling me about [b.topic]. My question was about [a.topic]", 2),
    ("I wrote about [a.topic] and [b.topic]. The (second|latter) is solved, the (first|former) is not", 2),
    ("I wrote about [b.topic] and [a.topic]. The (second|latter) is still open, the (first|former) is solved", 2),
    ("(forget|never mind) [b.topic]; what about [a.topic]?", 3),
    ("it is [a.topic] that worries me, not [b.topic]", 2),
)

VAGUE = (
    ("it still does not work. [help]", ("login_problem", "card_declined")),
    ("I tried again (as you said|twice) and got the same message", ("login_problem", "card_declined")),
    ("the money is (still|) not there. [help]", ("transfer_pending", "wrong_charge", "savings_rate")),
    ("I (have a question|am calling) about my card. [help]", ("card_lost", "card_declined", "foreign_payment")),
    ("I need a new card. [help]", ("card_lost", "card_declined", "address_change")),
    ("I do not understand the {amount} on my statement. [help]", ("wrong_charge", "fee_complaint", "fraud_report")),
    ("I want my {amount} back. [help]", ("wrong_charge", "fraud_report", "transfer_pending")),
    ("what about the interest? [help]", ("loan_question", "savings_rate")),
    ("I am moving abroad in {month}. [help]", ("address_change", "account_closure", "foreign_payment")),
    ("my details have changed and I have no access. [help]", ("address_change", "login_problem")),
    ("{small} is too much. [help]", ("fee_complaint", "foreign_payment", "wrong_charge")),
    (
        "something is wrong with my account. [help]",
        ("fraud_report", "login_problem", "wrong_charge", "account_closure"),
    ),
    ("I am still waiting (for an answer|). [help]", ("transfer_pending", "loan_question", "account_closure")),
    ("please do it as soon as you can. [help]", ("account_closure", "address_change", "card_lost")),
)

GREETINGS = {
    "plain": ("Hello,", "Hi,", "Good morning,", "Good afternoon,"),
    "polite": ("Dear Sir or Madam,", "Dear team,", "Good day,", "Dear all,"),
    "chatty": ("Hi there!", "Hello everyone!", "Hi all, hope you are well.", "Hey,"),
    "annoyed": ("Hello.", "To whom it may concern:", "Hello again.", "Once more:"),
    "terse": ("Hi.", "Hi -", "Hello:", "Quick one:"),
}
SIGN_OFFS = {
    "plain": ("Thanks, {first}", "Regards, {first} {last}", "Best, {first}", "{first} {last}"),
    "polite": ("Kind regards, {first} {last}", "Yours faithfully, {first} {last}", "With many thanks, {first} {last}"),
    "chatty": ("Cheers, {first}", "Thanks a lot! {first}", "Have a nice day, {first}", "Bye, {first} :)"),
    "annoyed": ("{first} {last}", "I expect an answer. {last}", "{last}", "Waiting, {first} {last}"),
    "terse": ("{first}", "thx", "{initials}", "ta, {first}"),
}
REMARKS = {
    "plain": (),
    "polite": ("I would be grateful for your help.", "I apologise for the trouble.", "Many thanks in advance."),
    "chatty": ("Sorry for bothering you!", "You were so helpful last time.", "I am a bit lost here, haha."),
    "annoyed": ("This is not good enough.", "I am tired of this.", "How hard can it be?", "I am losing patience."),
    "terse": (),
}
DETAILS = (
    "my account is {account}",
    "account {account}",
    "you can reach me on {phone}",
    "card ending {last4}",
    "my date of birth is {born}",
    "customer number {number}",
    "my e-mail is {email}",
)

AGAIN = (
    "second try: {text}",
    "I am sending this again. {text}",
    "{text} Any news?",
    "{text} Please reply.",
    "resending: {text}",
    "{text} It is still the same.",
    "{text} (Sent again.)",
)

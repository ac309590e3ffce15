"""Word lists and templates of the synthetic bank messages. All names, places and shops are invented.

A template is text with `(this|that|)` alternatives, which may nest, and `{slots}`; `messages.py` fills both in. A slot
stands for the same value throughout one message. Clauses start in lower case and carry no full stop.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Intent:
    """How people write about one subject."""

    topic: str
    """Singular noun phrases: "this is about ..."."""
    doing: str
    """Participles: "I was ..."."""
    settled: tuple[str, ...]
    """Clauses saying that the matter is closed; they serve as mentions in passing."""
    says: tuple[str, ...]
    """Clauses that describe the situation."""
    asks: tuple[str, ...]
    """Requests and questions."""


CARD_LOST = Intent(
    topic="my lost card|the missing card|the card I (lost|cannot find)|my stolen purse|my stolen wallet",
    doing="looking for my card|waiting for my replacement card|turning the house upside down for my wallet",
    settled=(
        "(my new card|the replacement card) (has arrived|came {when})",
        "(I found|someone handed in) the card (I had lost|that was missing)",
        "the lost card (is blocked|has been replaced)",
    ),
    says=(
        "I (lost|misplaced|dropped) my {card} {when}",
        "I (cannot find|can no longer find|have lost track of) my {card}",
        "I (must have|may have|think I) left my {card} (on the train|in a taxi|at {merchant}|on a bench)",
        "my (purse|wallet|handbag) (was stolen|disappeared|went missing) {when} (with|and so did) my {card}",
        "the card ending {last4} (fell out of my bag|went missing|vanished) (at {merchant}|in {town}|on my way home)",
        "I have (looked|searched) everywhere and my {card} (is nowhere to be found|has not turned up)",
        "a cash machine in {town} (swallowed|kept|did not give back) my {card}",
        "our toddler has hidden my {card} and (nobody knows where|it has not turned up)",
        "(no sign|not a trace) of my {card} since {day}",
    ),
    asks=(
        "please (block|freeze|cancel) it (right away|today|before anyone uses it|)",
        "can you send (me a new one|a replacement) (to my home address|)?",
        "how long does a (replacement|new one) take?",
        "how (do|can) I (block|freeze) it (myself|)?",
    ),
)

CARD_DECLINED = Intent(
    topic="my (declined|rejected|refused) card|the card that does not work|the refused payment at {merchant}",
    doing="trying to pay at {merchant}|standing at the till in {merchant}|trying my card in one shop after another",
    settled=(
        "my card (works|is accepted) again",
        "the card that was (declined|refused) {when} (works|is fine) now",
        "paying at {merchant} (went through|worked) in the end",
    ),
    says=(
        "my {card} was (declined|refused|rejected|turned down) at {merchant} {when}",
        "the (till|terminal|card machine) at {merchant} would not (take|accept|read) my {card}",
        "I could not pay {amount} at {merchant} although there is (enough|plenty of) money in the account",
        "paying (online|with my phone|contactless) (no longer works|fails every time)",
        "(three|two|several) shops in {town} have turned my {card} away",
        'the cash machine says "not permitted" whenever I (use|insert) my {card}',
        "I stood at the checkout with a full trolley and the payment did not go through",
        "my {card} (does not work|is refused) (in {country}|on holiday in {country}|abroad)",
        "my (new|replacement) {card} is not accepted anywhere",
        "an online order for {amount} (failed|was refused) (twice|again) with the card ending {last4}",
    ),
    asks=(
        "why (was it|is it being) (refused|declined)?",
        "is there a (block|limit|restriction) on it?",
        "please (unblock it|lift the limit|check what is wrong with it)",
        "can you make it work again?",
    ),
)

TRANSFER_PENDING = Intent(
    topic="my (pending|late|missing) transfer|the transfer to {person}|the {amount} I sent to {person}",
    doing="checking on a transfer|waiting for a transfer to arrive|calming down {person}, who is waiting for money",
    settled=(
        "the transfer to {person} (has arrived|went through)",
        "{person} has (received|got) the {amount}",
        "the payment that was stuck (is through|has arrived)",
    ),
    says=(
        "I (sent|transferred) {amount} to {person} {when} and it has (not|still not) arrived",
        "my transfer of {amount} (is still pending|has been pending since {day}|is stuck)",
        'the payment to {payee_account} has shown as "processing" for {days}',
        "{person} is still waiting for the {amount} I (transferred|sent) {when}",
        "my rent left the account {when} but my landlord has not (received|got) it",
        "the {amount} has left my account but never (reached|got to) {person}",
        "a transfer to my own savings account has been (hanging|in limbo) for {days}",
        "I moved {amount} between my accounts {when} and it is nowhere to be seen",
        "the money I (sent|wired) to {country} has been on its way for {days}",
        "my (salary|pension) was due {when} and is not on the account",
    ),
    asks=(
        "when will it (arrive|go through|be credited)?",
        "where is (the money|it) now?",
        "can you (trace|chase|speed up) it?",
        "please (push it through|stop it and send the money back|tell me what is holding it up)",
    ),
)

WRONG_CHARGE = Intent(
    topic="the (wrong|double) (charge|booking) from {merchant}|the refund from {merchant}|the wrong amount booked",
    doing="going through my statement|asking {merchant} for my money|comparing my receipts with the statement",
    settled=(
        "{merchant} has (refunded|paid back) the (extra amount|{amount})",
        "the double (charge|booking) from {merchant} has been (reversed|corrected)",
        "the wrong amount on my statement (has been put right|was corrected {when})",
    ),
    says=(
        "{merchant} (charged|billed|debited) me twice (for the same order|for {amount}|) {when}",
        "I paid {amount} at {merchant} but {amount2} (was taken|left my account|was booked)",
        "I (returned|cancelled|sent back) my order from {merchant} and was (charged|debited) anyway",
        "{merchant} still takes {amount} every month although I cancelled (the subscription|my membership)",
        "there is a mistake on my statement: {amount2} instead of {amount} for {merchant}",
        "the same payment of {amount} appears twice on my (statement|account)",
        "the refund from {merchant} (never came|was deducted instead of credited)",
        "a hotel in {country} kept the deposit of {amount} although we (paid|checked out) properly",
        "I was (charged|debited) {amount} for a {merchant} order that (never came|I did not receive)",
    ),
    asks=(
        "please (refund|return|pay back) the difference",
        "can you (reverse|correct) it?",
        "how do I dispute (it|this payment)?",
        "I want (the extra amount|my money) back",
    ),
)

LOAN_QUESTION = Intent(
    topic="(the|my) (loan|mortgage|car loan)|the early repayment of my loan|the credit I (asked|applied) for",
    doing="reading about your loans|comparing mortgage offers|working out what I can afford to borrow",
    settled=(
        "the (loan|mortgage) (is signed|has been approved|is paid off)",
        "I no longer need (the|a) (loan|mortgage)",
        "my question about (instalments|early repayment) has been answered",
    ),
    says=(
        "I am (thinking of|considering) borrowing {big} for (a car|a new kitchen|our wedding|a new roof)",
        "we (want|would like) to buy a (flat|house) in {town} and need (a mortgage|financing) of about {price}",
        "I (would like|want) to (pay off|repay) what I (owe|borrowed) (early|ahead of time)",
        "my monthly (instalment|repayment) of {amount} is (too high|hard to manage) for me at the moment",
        "your website (mentions|advertises) (credit|financing) at {rate}",
        "I am self-employed and wonder whether I can (get credit of|borrow) {big}",
        "the fixed rate on our mortgage (ends|runs out) in {month}",
        "I applied for {big} {when} and have not heard (anything|back)",
        "I could (get|have) {big} over {years} years (elsewhere|from another bank) at {rate}",
    ),
    asks=(
        "what (interest rate|rate) would I (get|pay)?",
        "which documents do you need (from me|)?",
        "how much could I borrow?",
        "is there a (charge|penalty) for paying early?",
        "can I (pause|lower) the instalments (for a few months|)?",
    ),
)

ACCOUNT_CLOSURE = Intent(
    topic="the closing of my (second|old|) account|my (cancelled|closed) account|my move to another bank",
    doing="thinking of closing my account|sorting out which accounts I still need|getting ready to change banks",
    settled=(
        "my (old|second) account (is closed|has been closed)",
        "I have decided to (keep|stay with) my account after all",
        "the (closing|final) statement of my old account has arrived",
    ),
    says=(
        "I (want|would like) to (close|give up|get rid of) my (current|savings|joint) account",
        "I am (moving|switching) to another bank (and no longer need this account|in {month})",
        "(please close|I am cancelling|I wish to terminate) account {account}",
        "my late (mother's|father's|aunt's) account has to be wound up",
        "we are separating and the joint account should (go|be dissolved)",
        "I have decided to leave (the bank|you) after {years} years",
        "I (never use|have no use for) my second account (any more|)",
        "I am (moving|going back) to {country} for good and will not need the account after {month}",
        "the savings account of my (son|daughter) is empty and can go",
    ),
    asks=(
        "what must I (sign|do for that)?",
        "please send the (remaining money|final balance) to {payee_account}",
        "please confirm (the end date|that it is done)",
        "how long is the notice period?",
    ),
)

ADDRESS_CHANGE = Intent(
    topic="my (new|change of) address|my new (phone|mobile) number|my new surname|the address you have for me",
    doing="telling everyone my new address|unpacking boxes in the new flat|forwarding my post",
    settled=(
        "my new address is in the (system|app) now",
        "you already have my new (address|phone number)",
        "the letters now (come|go) to the right address",
    ),
    says=(
        "I (have moved|moved) to {address} {when}",
        "we (are moving|will move|move) to {town} (on {date}|next month)",
        "my (new|current) address is {address}",
        "my (letters|statements) (still go|keep going) to my old (flat|place) in {town}",
        "my (phone|mobile) number (has changed to|is now) {phone}",
        "I got married in {month} and my surname is now {surname}",
        "my e-mail address is now {email}",
        "the (card|post) you sent went to my parents' house, where I no longer live",
        "I am staying at {address} until {month}",
    ),
    asks=(
        "please (update|change) (my details|your records)",
        "can you (change|correct) it (in your system|)?",
        "do you need (proof|a copy of the tenancy agreement)?",
        "where (can|do) I change it (in the app|)?",
    ),
)

LOGIN_PROBLEM = Intent(
    topic="my (login|password|locked access)|the app on my new phone|the code that never comes",
    doing="trying to log in|setting up the app on my new phone|resetting my password",
    settled=(
        "I can log in again",
        "the (code|text message) has arrived and the app works",
        "my (password|access) has been reset",
    ),
    says=(
        "I (cannot|am unable to) (log in to|sign in to|get into) (the app|online banking|my account) (since {day}|)",
        "the app (rejects|does not accept|refuses) my (password|PIN|fingerprint|passcode)",
        "I (forgot|have forgotten|no longer know) my (password|PIN|user name)",
        "the (text message|e-mail) with the code never (arrives|reaches me)",
        "I have a new phone and the app asks for a code (that I do not have|)",
        "my online access is (locked|blocked) after three wrong (tries|attempts)",
        'the page (shows|says) "error {err}" (every time|whenever I enter my password)',
        "since the last update the app (crashes|closes) before I can enter my PIN",
        "the security code goes to my old number {phone}",
    ),
    asks=(
        "how (do|can) I reset it?",
        "please (unlock|reset|restore) my access",
        "can you send (me|) a new code?",
        "what am I doing wrong?",
    ),
)

FEE_COMPLAINT = Intent(
    topic="(the|your) (account|overdraft|monthly|late payment) fee|the {small} you took|the price of my account",
    doing="adding up what my account costs|reading your price list|looking at the fees of the last year",
    settled=(
        "you have (waived|refunded) the {small} fee",
        "I now understand (the|your) (monthly|account) fee",
        "I have accepted the (overdraft|account) fee",
    ),
    says=(
        "you (charged|took|deducted) {small} (as an account fee|for the account|for {service}) {when}",
        "I pay {small} a month for an account that (was|used to be) free",
        "{small} for {service} is (too much|a rip-off|far too expensive)",
        "the (overdraft|late payment|maintenance) fee of {small} is (unfair|not justified|news to me)",
        "nobody told me (about|that there would be) a charge of {small} for {service}",
        "you raised the (monthly price|account fee) to {small} without (asking|telling) me",
        "your (fees|prices) (have gone up|keep going up) (again|every year)",
        "I was promised a free account and now (I see|there is) a deduction of {small}",
        "{small} for one payment in {country} is more than (the coffee|what I bought) cost",
    ),
    asks=(
        "please (waive|refund|remove) it",
        "I would like a written explanation",
        "I (expect|want) it (back|refunded)",
        "how can I avoid (it|this charge) (in future|)?",
    ),
)

SAVINGS_RATE = Intent(
    topic="the (interest|rate) on my savings|my (savings|deposit) account|the fixed-term deposit",
    doing="comparing savings rates|looking for a home for my bonus|checking the interest on my savings",
    settled=(
        "my deposit has been (renewed|paid out)",
        "the interest on my savings (has been credited|is there)",
        "I have (opened|found) a savings account",
    ),
    says=(
        "I have {big} to (put aside|set aside|keep somewhere) for {years} years",
        "my savings account (pays|earns) (only {rate}|next to nothing)",
        "I saw that (new customers get|you now offer) {rate}",
        "my fixed-term deposit (ends|matures) (on {date}|in {month})",
        "I (want|would like) to (open a savings account|put something aside) for my (daughter|grandson)",
        "the interest for last year (has not been credited|is missing|looks too low)",
        "other banks pay {rate} on (instant-access|easy-access) accounts",
        "I would like to move {amount} a month into something that earns (interest|more)",
        "I (inherited|was given) {big} and (do not need it|want it to be safe) for now",
    ),
    asks=(
        "what (rate|interest) do you (pay|offer) (at the moment|)?",
        "is the rate (fixed|guaranteed)?",
        "can I (get|have) the better rate?",
        "when is interest (paid|credited)?",
        "what would I (earn|get) on that?",
    ),
)

FOREIGN_PAYMENT = Intent(
    topic="my payment to {country}|the exchange rate|using my card in {country}|the money from {country}",
    doing="planning my trip to {country}|paying for a room in {country}|looking up exchange rates",
    settled=(
        "I am back from {country}",
        "the (invoice|money) from {country} has been (paid|settled)",
        "my question about the exchange rate has been answered",
    ),
    says=(
        "I am (travelling|going|flying) to {country} (in {month}|next week)",
        "I (want|need) to send {amount} to (a friend|family|a supplier) in {country}",
        "I bought something from a shop in {country} and the (conversion|exchange rate) (looks odd|is not clear to me)",
        "the shop in {country} asked whether to charge in {currency} or my own currency",
        "my employer in {country} (will pay|pays) me in {currency}",
        "I (have to|need to) pay an invoice of {amount} from {country}",
        "I will be living in {country} for (three|six) months and paying with my {card}",
        "my (sister|aunt) in {country} (wants to|is going to) send me money",
        "I need {currency} in cash for a trip in {month}",
    ),
    asks=(
        "which exchange rate (do you use|applies)?",
        "what does (that|it) cost?",
        "how long does (it|that) take?",
        "will my {card} work there?",
        "which details do you need?",
    ),
)

FRAUD_REPORT = Intent(
    topic="the (fraud|scam) (I reported|on my account)|the payment I did not make|the stranger who used my card",
    doing="talking to the police about a scam|changing all my passwords after a scam|reading your warning about scams",
    settled=(
        "the fraud case has been (closed|settled)",
        "the payment I did not recognise was (my own|my wife's) (after all|)",
        "you have (paid back|returned) what the scammers took",
    ),
    says=(
        "there are (payments|transactions|bookings) (on my account|on my {card}) that I did not make",
        "someone (spent|took) {amount} at {merchant} and it was not me",
        "I (got|had) a (text|call|mail) claiming to be from you and gave them my code",
        "I do not (know|recognise) (the payment|a debit) of {amount} to {merchant}",
        "a caller (said|claimed) my account was in danger and had me transfer {amount}",
        "I think I was (scammed|tricked|conned) (by an online shop|when I bought from {merchant}|)",
        "somebody has opened (a loan|an account) in my name",
        "my {card} is in my (pocket|drawer) but it was used in {country} {when}",
        "someone (logged in|got into the app) at night and changed my phone number",
        "whoever stole my purse has already paid {amount} with my {card}",
    ),
    asks=(
        "please (stop|block) (everything|all payments)",
        "can I get the money back?",
        "must I (go to|inform) the police?",
        "please investigate",
        "whom do I report this to?",
    ),
)

INTENTS: dict[str, Intent] = {
    "card_lost": CARD_LOST,
    "card_declined": CARD_DECLINED,
    "transfer_pending": TRANSFER_PENDING,
    "wrong_charge": WRONG_CHARGE,
    "loan_question": LOAN_QUESTION,
    "account_closure": ACCOUNT_CLOSURE,
    "address_change": ADDRESS_CHANGE,
    "login_problem": LOGIN_PROBLEM,
    "fee_complaint": FEE_COMPLAINT,
    "savings_rate": SAVINGS_RATE,
    "foreign_payment": FOREIGN_PAYMENT,
    "fraud_report": FRAUD_REPORT,
}

"""What people write when they want a task done: the examples that `kvik.planning.tasks` learns to tell tasks apart from.

DESCRIPTIONS: by task, a description a line. VOCABULARY: by task, words that speak for it whatever stands around them.
tests/planning/held_out.tsv has others, which nothing here was written from.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["DESCRIPTIONS", "VOCABULARY"]

_CODE = """
write a Python function that sorts a list
fix the bug in this program
refactor the method so that it is easier to read
complete the code at the cursor
generate a script that renames files in a folder
convert this JavaScript module into Go
add type annotations to the source file
review the pull request and point out mistakes in it
a shell command that finds duplicate files
write a query for our PostgreSQL database
explain this compiler error
implement quicksort in C
build a web page with HTML and CSS
translate the Python code to Kotlin
create a Dockerfile for the service
a macro for a spreadsheet that colours cells
debug a segmentation fault
code assistant in the IDE
document the public API with docstrings
write tests with pytest
a program that reads a CSV file and prints the mean of each column
make this loop faster
parse JSON in Swift
write a parser for arithmetic expressions
a GitHub action that builds the package
turn a mock-up into a Vue component
why does my code throw an exception
an algorithm that finds the shortest path in a graph, in Scala
rewrite a callback with async and await
Terraform configuration of three servers
solve programming puzzles of a contest
vectorise this numpy expression
my program crashes at start, here is the log
which line of this listing is wrong
write code
coding help
software development
generate boilerplate for a command line tool
port a library from Ruby to Elixir
a Django model with three tables
clean up this messy class
find the memory leak
how do I reverse a linked list in Haskell
create a small web server in Node
predict the next lines while the developer types
an awk command that sums the second column
comment my functions
type-safe wrapper around an HTTP client
make the unit tests pass
build an Android screen with two buttons
MATLAB script for filtering a signal
infer the schema of a table and write the migration
shader code for water
why is this query so slow and how should it be indexed
a Kubernetes manifest for a cron job
"""

_TRANSLATION = """
translate from English to German
translate this text into Spanish
how do you say good morning in Finnish
a French version of the product page
turn the German letter into plain English
machine translation of news between Hindi and Urdu
give me the Russian for this phrase
we have documents in Arabic and need them in English
localise a game for players in Japan
what does this sentence mean in English, it is written in Greek
Swedish into Norwegian, keeping the tone
the same paragraph in Mandarin
translator for travellers
I got a message in Hungarian and want to understand it in my own language
translate medical records from Vietnamese
rewrite the following in Hebrew
a dictionary that gives Dutch equivalents of English idioms
transfer the meaning of a Thai recipe into Indonesian
render Ukrainian legal texts in Romanian
English, then the Catalan translation under it
from Icelandic to Faroese
how is "thank you" said in Welsh
interpreting between a Persian doctor and an English patient
make our web site multilingual: Bengali, Tamil, Malay
put the song text into Estonian
translate technical manuals for the Greek market
the speech is in Croatian, we need it in Slovenian
translating
language translation
a translation service
from one language into another
Spanish to English
could you tell me what this Italian sign says
write the same thing in Portuguese
I speak only English and the letter is in Russian
customer mails come in many languages and have to be put into ours
transcribe and translate a Turkish broadcast
our catalogue must exist in German, French and Dutch
the Japanese word for patience
make this sound natural to a native speaker of Arabic after moving it over from English
convert these sentences to Afrikaans
render the verse in Polish
word for word, into Hungarian
help tourists understand Greek menus
parallel text in Danish and English
legal translation
what is the Hindi expression for this
put into simple Chinese
passage of Homer into modern English
"""

_MATHS = """
calculate the area of a circle with radius four
solve this equation
a word problem: Anna has 12 marbles and gives away five, how many are left
what is 17 times 23
differentiate the function
evaluate a definite integral
prove the theorem by induction
find the roots of a quadratic polynomial
how many different hands of cards are there
compute the mean and the standard deviation of these numbers
mathematical reasoning with several steps
homework in geometry: the angles of a triangle
arithmetic with fractions
linear algebra exercises, determinant and inverse
a problem about speed, distance and time
compound interest on a deposit after ten years
the expected value of a game of dice
olympiad problems in number theory
is 391 a prime number
simplify the expression and show the steps
the limit of a sequence
logic puzzles that need careful deduction
how much does each of three friends pay for a bill of 84 dollars
percentages, ratios and proportions
maths tutor that explains every step
convert 3/8 to a decimal
two trains leave at the same time, when do they meet
calculus questions of an exam
derive the formula for the sum of the first n squares
how many litres of paint for a wall of 5 by 3 metres
maths
mathematics problems
do the sum 458 + 1297
what number comes next in the series
if five machines make five parts in five minutes
how long does the journey take at 60 miles per hour
a shop gives 20 percent off, what does the coat cost
how many apples remain
arithmetic
multi-step numerical reasoning
a square has side 7, how big is its diagonal
the chance of drawing two aces
factor this trinomial
give a proof that there are infinitely many primes
graph the parabola and find its vertex
solve the system of two linear equations
numerical answers for physics exercises
the sum of the digits
how much money will I have after saving 50 a month for six years
step by step solutions to school exercises
what fraction of the cake is left
reason carefully to the final number
greatest common divisor of 84 and 120
optimise a function under a constraint by Lagrange multipliers
"""

_FACTUAL = """
what is the capital of Australia
who wrote Don Quixote
when was the telephone invented
answer questions about geography correctly
question answering over our documents
how far is the moon from the earth
which element has the symbol Fe
where was Mozart born
quiz questions with one right answer
reply with the fact only, no guessing
an FAQ bot that quotes the manual
find the answer in the passage below
what does the law say about notice periods
look up the price of a part in the catalogue
name the author of the book
factual questions about science
who won the world cup in 1998
how many people live in Canada
retrieval augmented answers, grounded in the sources
is it true that bats are blind
what date did the war end
extract the phone number from the message
knowledge base for technicians that gives exact values
what is the largest ocean
the definition of osmosis
medical facts, correct and checked
a reference desk: dates, places and names
which river flows through Vienna
history questions for a test
when does the museum open according to this page
say what the contract states about termination
true or false questions
facts
factual answers
question answering
short answers to factual questions
who is the president of France
when did the first man walk on the moon
how many bones does a human body have
why is the sky blue
which country has the most inhabitants
at what temperature does lead melt
who invented the printing press
what language is spoken in Brazil
name the longest bridge in Europe
the birthday of Marie Curie
what is the speed of light
tell me which form I need according to the handbook
answers must be correct and found in the text
given this paragraph, in which city does the action take place
search results in, exact answer out
extractive reading comprehension
pull the invoice date out of the letter
general knowledge
a quiz app with one correct answer each
what does DNA stand for
how old was Bach when he died
support staff ask which part fits which machine
exam questions in biology with a single right choice
"""

_SUMMARIZATION = """
summarize this article
a summary of the document in three sentences
shorten the text to half its length
what are the main points of this report
make bullet points of a long e-mail
key takeaways from the lecture
an abstract for a scientific paper
meeting notes into action items
sum up the discussion so far
condense the chapter
give me the short version
abridge a book for busy readers
executive summary of the quarterly results
recap what happened in the thread
the essence of the speech in one line
a synopsis of the film from its script
compress these pages to a paragraph
too long, did not read
headline for a news story
brief of a court decision
overview of the literature on a subject
extract the most important statements of a transcript
digest of today's news
reduce the notes to the essentials
summarise support tickets for the weekly report
what did the author conclude, in brief
the call was an hour long, I need it on one page
short abstracts of patents
list the decisions taken in the meeting
gist of a podcast
summarization
text summarization
summarising long documents
the most important points only
a few sentences that say what this is about
what is this paper about
explain in two lines what they agreed on
make it shorter
cut the essay down to one hundred words
abstract of a thesis
quick recap of chapter four
bring a long conversation to its essentials
a paragraph instead of ten pages
release notes from a list of commits, in brief
reports for the management in five lines
headlines for articles
turn the lecture recording into notes
what happened this week, from the newspapers
outline of the argument of this book
reduce reviews to what people liked and disliked
highlights of the match from the commentary
keep only what matters
the long story short
"""

_STORY = """
write a short story about a lighthouse
once upon a time there was a princess
continue the tale
a novel about the sea
compose a poem about autumn
creative writing
a fairy tale for children
a horror story set in a hospital
verses for a wedding
song lyrics about summer love
describe the landscape as a novelist would
the plot and the first scene of a thriller
a sonnet in the manner of Shakespeare
write fiction in the first person
invent a legend about the mountain
a limerick about a cat
chapter two of the adventure
a romance in ancient Rome
write a monologue of a dying king
a screenplay for a short film
a myth that explains the seasons
imaginative prose with a surprising twist
the hero meets the wizard, go on from there
a fantasy world with elves and magic
a ballad of sailors
a literary description of a city at night
write a scene full of suspense
rewrite the ending of the story so that the ghost survives
a humorous anecdote about my aunt
epic poem
story
storytelling
story writing
fiction
poetry
a tale of two brothers
write me a poem for my mother
a rhyme about snow
begin a mystery set in a small village
the next chapter of my book
tell me a story about a brave mouse
a science fiction short about the last astronaut
words for a lullaby
describe a storm at sea in beautiful language
a children's book with animals
what happens when the knight opens the gate, write on
a drama in three acts
write the diary of a soldier
fantasy prose
a love letter in verse
ghostly tale with a moral
an epic about the founding of a city
creative text with unusual images
rap verses about my town
a parable
"""

_DIALOGUE = """
talk with me as if you were a knight
a conversation between two friends
play the role of a doctor, I am the patient
chat with the user in the voice of a wizard
dialogue for a play
a character in a video game that answers the player
act as my girlfriend
let us chat
keep up a natural conversation
I want to practise English conversation with somebody
an interview in which you ask the questions
impersonate Napoleon
the words spoken by a mother and her son at dinner
a virtual friend who listens
small talk about the weather
role-playing game master
you are a strict teacher and I am late
debate with me about free will
lines for two actors
a talking toy
improvise a phone call with an angry customer
converse about my hobbies
social chat in a persona
banter and jokes back and forth
an imaginary talk of Einstein with Newton
stay in character and reply to what I say
a companion for conversation
someone to talk to in the evening
we take turns speaking
dialogue
role play
a chat
chatting
conversation
open-domain conversation
talk to me
be my conversation partner
play a waiter while I order
you are a detective and interrogate me
answer in the manner of Yoda
characters of a visual novel who talk with the player
a shopkeeper in a game who haggles
a quarrel between neighbours, turn by turn
friendly chit-chat
I say something and you answer as my grandfather would
let me speak with Cleopatra
a talk show with an invented guest
write what the couple say to one another
virtual companion
a therapist figure to talk with
conversational practice for learners of Spanish
discuss books with me like a friend
telephone conversation, acted out
lines of dialogue for a sitcom
"""

_BRAINSTORMING = """
ideas for a birthday present
brainstorm names for a start-up
suggest titles for my talk
a list of creative ways to save water
what could I cook tonight, surprise me
as many different suggestions as possible
find unusual uses for old tyres
inspire me with topics for a podcast
propose features for a fitness app
options for a weekend trip
ten concepts for a logo
ideation workshop about the future of libraries
possible causes of the outage, think widely
crazy inventions
names for a puppy
give me prompts to draw
alternatives to a meeting
think outside the box about parking
a variety of gift ideas
hobby ideas for rainy days
experiments that we could try
different approaches to a problem, the more the better
campaign ideas for a charity
what might we call our band
themes for a conference
suggest activities for children
business ideas with little capital
many possible endings, just the ideas
novel research questions
explore possibilities for the empty shop
brainstorming
brainstorm
ideas
many ideas
suggestions
naming a product
give me twenty names
a list of themes
what else could be done with the garden
things to do in Lisbon
how might we attract more members, all ideas welcome
find catchy names for a coffee shop
unusual hobbies
possible topics for a thesis
creative ideas for a lesson
what are some ways to use leftover bread
recipes that nobody has thought of
new flavours of ice cream
hypotheses that would explain the data
pick titles for the chapter, several of them
mascots for a football club
games for a long car ride
questions that I could ask in an interview
the strangest ideas you have
ways to raise money
costume ideas
I need inspiration
"""

_GENERAL = """
general purpose
a helpful assistant
an assistant for our web site
chatbot for all kinds of questions
I do not know yet what it will be used for
various tasks
everyday use
a default that works for most things
assistant for employees, many different requests
instructions of any kind
production chat service
customers ask about anything
mixed requests
a bot that helps users
all sorts of jobs
general instructions
office assistant for mails and notes
whatever people type
no special purpose
support chatbot
an AI assistant in an app
broad use by many people
one setting for everything
something balanced
helping with daily work
a universal model behind an API
different kinds of prompts
I have not decided on a task
anything at all
everyday assistant at home
general chat assistant
serve unknown users with unknown requests
general
assistant
chatbot
general chatbot
helpful chat assistant for everyone
all purposes
multi-purpose
different tasks every day
I have no idea
default
a good default
not sure yet
production
in production
for a product with many users
we cannot foresee what people will ask
requests of every sort arrive
helper in a messaging app
it should be able to do a little of everything
one model for the whole company
standard settings
typical use
home assistant
digital assistant for clients
virtual assistant
a bot on our page that deals with every question
not specialised in anything
balanced between quality and variety
"""

DESCRIPTIONS: Mapping[str, str] = {
    "code": _CODE, "translation": _TRANSLATION, "maths": _MATHS, "factual QA": _FACTUAL,
    "summarization": _SUMMARIZATION, "story": _STORY, "dialogue": _DIALOGUE, "brainstorming": _BRAINSTORMING,
    "general": _GENERAL,
}  # fmt: skip

VOCABULARY: Mapping[str, str] = {
    "code": """code coding program programming programmer developer software function method class variable script bash
        shell command python java javascript typescript rust go kotlin swift c++ c# php ruby perl haskell scala sql query
        database html css react vue angular django node api endpoint rest json yaml xml regex regular expression
        compile compiler compiles debug debugger bug bugs error stack trace exception pointer segfault refactor unit test
        tests pytest git commit repository pull request ide editor autocomplete completion snippet library package module
        import algorithm implement implementation implement loop recursion backend frontend docker kubernetes terraform
        ansible linux makefile notebook pandas numpy pseudocode codebase legacy boilerplate
        vulnerability linter syntax fortran assembly matlab arduino firmware driver""",
    "translation": """translate translation translator translating translations interpret interpreter localize localise
        localization localisation bilingual multilingual subtitles subtitle language languages mother tongue native
        meaning equivalent english french german spanish italian portuguese dutch danish swedish norwegian
        finnish icelandic polish czech slovak hungarian romanian bulgarian greek turkish russian ukrainian serbian
        croatian slovenian arabic hebrew persian farsi hindi urdu bengali tamil punjabi chinese mandarin cantonese
        japanese korean vietnamese thai malay indonesian tagalog swahili zulu yoruba amharic latin esperanto         welsh irish gaelic basque catalan estonian latvian lithuanian albanian armenian georgian mongolian""",
    "maths": """maths math mathematics mathematical arithmetic algebra geometry calculus trigonometry statistics
        probability equation equations solve solution solutions integral derivative differentiate integrate polynomial
        matrix vector determinant prime divisor fraction fractions percentage percent ratio sum product
        difference multiply divide add subtract plus minus times squared cube root logarithm exponential theorem proof
        prove lemma induction combinatorics permutation count number numbers compute calculate calculation calculator
        reasoning step steps word problem problems interest mortgage speed distance area volume
        perimeter triangle circle angle average mean median variance expected dice coin cards odds puzzle logic
        aime olympiad""",
    "factual QA": """question questions answer answers answering fact facts factual who when where which what year date
        capital country river mountain planet high deep long old born died discovered painted wrote founded
        president king won largest smallest trivia quiz encyclopedia wikipedia knowledge lookup look up retrieve
        retrieval source sources cite quote quoted grounded passage context extract correct exact precise accurate
        accurately true false faq wiki definition define symbol         population currency""",
    "summarization": """summarize summarise summary summaries summarization summarizing tldr shorten short shorter
        condense condensed digest abridge abstract abstracts recap gist key main points takeaways takeaway highlights
        overview brief briefly bullet bullets essence essential essentials synopsis meeting transcript report
        reports article articles paper papers chapter thread long document documents findings conclusion conclusions
        compress paragraph executive outline""",
    "story": """story stories tale tales novel novella fiction fairy myth legend saga epic poem poems poetry verse
        rhyme sonnet limerick ballad lyrics song creative writing write narrative plot character characters chapter
        scene prologue epilogue hero heroine princess knight wizard witch ghost spaceship
        fantasy horror thriller romance mystery adventure science fiction twist ending prose vivid imaginative
        imagination compose author novelist screenplay script once upon""",
    "dialogue": """dialogue dialog conversation conversational converse chat chatting chats talk talks talking speak
        says say role role-play roleplay roleplaying play pretend act persona character in-character impersonate npc
        companion friend friendly banter small talk argue debate interview interviewer voice
        reply replies lines actors scene partner simulate simulation teacher student player
        game master girlfriend boyfriend """,
    "brainstorming": """brainstorm brainstorming idea ideas ideation suggest suggestion suggestions propose proposals
        names name naming tagline titles list many lots variety various different diverse possible
        possibilities options alternatives alternative creative unusual wild crazy original novel inspire inspiration
        come up think themes topics topic concepts invent inventions outside box features
        activities could might stuck""",
    "general": """general general-purpose purpose assistant assistants helpful everyday daily default defaults anything
        everything whatever any kind kinds all sorts various mixed mix mixture unknown bot chatbot production users
        customers employees customer service support instruction instructions following universal
        versatile broad most things task tasks personal unspecified""",
}

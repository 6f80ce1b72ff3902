"""Short chat instructions from templates and word lists: what a user types, in a few thousand variants.

Held-out prompts share neither a template nor a word with the training prompts.
"""

from __future__ import annotations

import re

import numpy as np

HELD_OUT_SHARE = 5  # every fifth word of a list is held out
SEEDS = {"train": 0, "held-out": 1000}

WORDS: dict[str, tuple[str, ...]] = {
    "topic": (
        "photosynthesis", "gravity", "black holes", "the water cycle", "vaccines", "inflation", "plate tectonics",
        "electric motors", "machine learning", "the immune system", "solar panels", "tides", "supply and demand",
        "democracy", "the French Revolution", "recycling", "DNA", "volcanoes", "blockchain", "the Renaissance",
        "batteries", "evolution", "the ozone layer", "compound interest", "the Roman Empire", "neural networks",
        "rainbows", "antibiotics", "the stock market", "earthquakes", "meditation", "the human heart", "wind energy",
        "the Silk Road", "quantum computing", "coral reefs", "the printing press", "hurricanes", "bacteria",
        "the solar system", "ocean currents", "the Cold War", "semiconductors", "nutrition", "bridges", "glaciers",
        "the nervous system", "magnetism", "urban planning", "satellites", "nuclear power", "the Industrial Revolution",
        "fermentation", "climate change", "encryption", "jazz music", "migration of birds", "the internet",
        "renewable energy", "sleep",
    ),
    "thing": (
        "bicycle", "laptop", "garden", "kitchen knife", "houseplant", "camera", "tent", "guitar", "coffee maker",
        "winter coat", "desk lamp", "backpack", "phone", "used car", "pair of running shoes", "bookshelf", "telescope",
        "sewing machine", "aquarium", "washing machine", "mattress", "toolbox", "piano", "kayak", "clock", "umbrella",
        "suitcase", "printer", "fridge", "skateboard",
    ),
    "animal": (
        "cat", "dog", "fox", "owl", "dolphin", "elephant", "rabbit", "tiger", "penguin", "turtle", "horse", "bear",
        "crow", "octopus", "bee", "wolf", "parrot", "mouse", "whale", "frog", "squirrel", "lion", "hedgehog", "camel",
        "butterfly",
    ),
    "place": (
        "Paris", "Tokyo", "New York", "the mountains", "Rome", "London", "Iceland", "Egypt", "Brazil", "the desert",
        "Australia", "Kenya", "the seaside", "Berlin", "India", "a small village", "Mexico", "the Arctic", "Greece",
        "Canada", "Beijing", "Norway", "Morocco", "an old castle", "Peru", "Venice", "a space station", "Thailand",
        "San Francisco", "Ireland",
    ),
    "person": (
        "teacher", "nurse", "farmer", "pilot", "chef", "student", "painter", "detective", "engineer", "musician",
        "sailor", "doctor", "librarian", "carpenter", "astronaut", "baker", "journalist", "gardener", "lawyer",
        "firefighter", "programmer", "photographer", "shopkeeper", "scientist", "mechanic",
    ),
    "skill": (
        "public speaking", "cooking", "drawing", "time management", "swimming", "writing", "chess", "budgeting",
        "running", "programming in Python", "playing the guitar", "gardening", "negotiating", "speed reading", "yoga",
        "learning Spanish", "photography", "studying for exams", "job interviews", "remembering names", "typing",
        "listening", "baking bread", "making friends", "dancing", "woodworking", "singing", "staying focused",
        "problem solving", "touch typing",
    ),
    "food": (
        "pancakes", "tomato soup", "fried rice", "apple pie", "lasagna", "vegetable curry", "banana bread",
        "chicken salad", "mashed potatoes", "chocolate cake", "guacamole", "mushroom risotto", "lentil stew",
        "fish tacos", "omelette", "pizza dough", "hummus", "oatmeal cookies", "pumpkin soup", "stir-fried noodles",
        "French toast", "roasted vegetables", "meatballs", "lemonade", "scrambled eggs",
    ),
    "feeling": (
        "happy", "lonely", "stressed", "curious", "tired", "nervous", "proud", "bored", "grateful", "angry", "hopeful",
        "confused", "homesick", "excited", "jealous",
    ),
    "country": (
        "France", "Japan", "Brazil", "Germany", "Canada", "Spain", "Italy", "India", "Egypt", "Mexico", "Australia",
        "Sweden", "China", "Argentina", "Turkey", "Poland", "Greece", "Portugal", "Norway", "Kenya",
    ),
    "function": (
        "reverses a string", "checks if a number is prime", "computes the factorial of a number",
        "finds the largest element of a list", "counts the vowels in a string", "sorts a list of numbers",
        "removes duplicates from a list", "checks if a word is a palindrome", "computes the Fibonacci sequence",
        "converts Celsius to Fahrenheit", "merges two sorted lists", "computes the average of a list",
        "counts words in a text", "finds the common elements of two lists", "reads a file and prints its lines",
        "computes the area of a circle", "flattens a nested list", "finds the greatest common divisor of two numbers",
        "generates a random password", "checks if a year is a leap year",
    ),
    "event": (
        "birthday party", "job interview", "wedding", "school trip", "team meeting", "camping weekend", "book club",
        "farewell party", "picnic", "conference talk", "road trip", "bake sale", "dinner with friends", "job fair",
        "science fair",
    ),
    "small": ("3", "4", "5", "6", "7", "8", "9", "10", "12", "15"),
    "large": ("17", "24", "36", "48", "125", "60", "72", "96", "150", "240", "18", "45", "80", "500", "1000"),
}  # fmt: skip

TEMPLATES: dict[str, tuple[str, ...]] = {
    "train": (
        "Explain {topic} in simple terms.", "What is {topic}?", "How does {topic} work?",
        "Why is {topic} important?", "Write a short paragraph about {topic}.",
        "Give me {small} facts about {topic}.", "Explain {topic} to a {person}.",
        "What are the advantages and disadvantages of {topic}?", "Write a short poem about {topic}.",
        "Describe the history of {topic} in three sentences.", "What should everyone know about {topic}?",
        "List {small} questions to ask about {topic}.", "Who discovered or invented {topic}?",
        "Compare {topic} and {topic}.", "What is the difference between {topic} and {topic}?",
        "Write a short story about a {animal} and a {animal}.", "Tell me a story about a {person} in {place}.",
        "Write a poem about a {animal}.", "What do {animal}s eat?", "Where does the {animal} live?",
        "Describe a {animal} in two sentences.", "Give me {small} names for a pet {animal}.",
        "How do I choose a good {thing}?", "How do I clean a {thing}?", "Write a short advertisement for a {thing}.",
        "What should I look for when buying a {thing}?", "How can I repair my {thing}?",
        "Plan a two-day trip to {place}.", "What is the best time to visit {place}?",
        "What should I pack for a trip to {place}?", "Describe {place} at night.",
        "What is the capital of {country}?", "Tell me about the culture of {country}.",
        "What is {country} famous for?", "Name {small} cities in {country}.",
        "What does a {person} do?", "Write a cover letter for a job as a {person}.",
        "How do I become a {person}?", "Describe a typical day of a {person}.",
        "Write a dialogue between a {person} and a {person}.",
        "How can I get better at {skill}?", "Give me {small} tips for {skill}.", "What are the benefits of {skill}?",
        "Write a weekly plan for practising {skill}.", "What mistakes do beginners make in {skill}?",
        "How do I make {food}?", "Give me a recipe for {food}.", "What goes well with {food}?",
        "Is {food} healthy?", "Write a shopping list for {food}.",
        "I feel {feeling}. What should I do?", "How can I help a friend who is {feeling}?",
        "Write a haiku about being {feeling}.", "Why do people feel {feeling}?",
        "Write a Python function that {function}.", "How would you write a function that {function}?",
        "Explain step by step how a program {function}.",
        "What is {large} plus {large}?", "What is {small} times {large}?",
        "If I have {large} apples and give away {small}, how many are left?",
        "A train travels {large} miles in {small} hours. What is its speed?",
        "Write an invitation to a {event}.", "How do I prepare for a {event}?",
        "Write a thank-you note after a {event}.", "Give me {small} ideas for a {event}.",
        "Write an email to a {person} asking for help with {skill}.",
        "Summarize the main ideas of {topic}.", "Make a list of pros and cons of having a {animal} as a pet.",
        "Rewrite this sentence in a formal way: I am {feeling} about the {event}.",
        "Translate into French: the {animal} is in the {thing}.",
        "Correct the grammar: the {person} have go to {place} yesterday.",
        "Complete the sentence: when the {person} opened the door,",
        "Give me a synonym for the word {feeling}.", "Use the word {feeling} in a sentence.",
        "Write a headline for a news article about {topic}.", "What are some books about {topic}?",
        "What would happen without {topic}?", "Is it safe to travel to {place} alone?",
        "Hi! Can you help me with {skill}?", "What can you tell me about {country}?",
    ),
    "held-out": (
        "Can you teach me the basics of {topic}?", "What are common misconceptions about {topic}?",
        "Describe {topic} to a ten-year-old child.", "How has {topic} changed our daily life?",
        "Write an introduction for an essay on {topic}.", "Give an example of {topic} from everyday life.",
        "Invent a legend about why the {animal} fears the {animal}.", "How long does a {animal} live?",
        "Write a letter from a {person} who has just moved to {place}.",
        "Which features matter most in a {thing}?", "My {thing} is broken. What now?",
        "Suggest {small} things to see in {place}.", "Which language do people speak in {country}?",
        "Tell me something surprising about {country}.",
        "What qualities make a good {person}?", "Write a short biography of a fictional {person}.",
        "I want to start with {skill}. Where do I begin?", "How much time does {skill} take to learn?",
        "Which ingredients do I need for {food}?", "Describe how {food} tastes.",
        "What advice would you give to someone who is {feeling}?", "Write a short diary entry of a {feeling} {person}.",
        "Show me JavaScript code that {function}.", "Divide {large} by {small} and explain each step.",
        "Make a checklist for a {event}.", "Write a toast for a {event}.",
        "Write a tweet about {topic}.", "Make up a riddle whose answer is {animal}.",
    ),
}  # fmt: skip


def prompts(split: str, count: int) -> list[str]:
    """`count` different instructions of "train" or "held-out": templates in turn, words at random, the split's seed."""
    rng = np.random.default_rng(SEEDS[split])
    templates = TEMPLATES[split]
    found: dict[str, None] = {}
    tries = 0
    while len(found) < count:
        found[_fill(templates[tries % len(templates)], split, rng)] = None
        tries += 1
        if tries > 100 * count:
            raise ValueError(f"the {split} templates have fewer than {count} variants")
    return list(found)


def _fill(template: str, split: str, rng: np.random.Generator) -> str:
    return re.sub(r"\{(\w+)\}", lambda field: str(rng.choice(words(field[1], split))), template)


def words(kind: str, split: str) -> list[str]:
    """The words of a list that belong to a split."""
    held_out = split == "held-out"
    return [word for i, word in enumerate(WORDS[kind]) if (i % HELD_OUT_SHARE == HELD_OUT_SHARE - 1) == held_out]

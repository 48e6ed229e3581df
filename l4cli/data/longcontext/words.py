"""Words to write with: what keys, filler and stories are made of; chosen to be common and short.

out: tuples of lower-case ASCII words without doubles
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """
    able agile airy amber ample ancient ardent arid autumn azure bald bare basic bitter black
    bland blank bleak blond blue blunt bold brave brief bright brisk broad bronze brown calm
    candid careful cheap cheerful chief chilly civil classic clean clear clever close cloudy
    coarse cold common cool copper cosy crimson crisp crooked cruel curious curly daily damp
    daring dark dear deep dense dim distant double dry dull dusty eager early earnest eastern easy
    elder empty equal exact fair faint faithful familiar famous fancy fast feeble fertile fierce
    final fine firm fixed flat fluent fond formal frail frank fresh friendly frosty full gentle
    giant glad global golden graceful grand grateful grave gray green half handy happy hard harsh
    hasty hazy heavy hidden high hollow honest huge humble hungry icy ideal idle inner iron ivory
    jolly joyful keen kind large late lazy lean level light little lively local lone long loud
    loyal lucky lunar mature mellow merry mild misty modest modern moist mute narrow neat new
    nimble noble noisy northern novel odd old open orange outer pale patient perfect pink plain
    polite poor prime proud public pure purple quick quiet random rapid rare raw ready red regular
    rich rigid ripe robust rocky rough round royal rural rusty sacred safe salty sandy scarlet
    secret senior sharp shiny short shy silent silver simple single sleepy slim slow small smart
    smooth snowy sober soft solar solid sour southern spare steady steep stern stiff still stout
    strange strict strong sturdy subtle sudden sunny super sweet swift tall tame tart tender thick
    thin tidy tight tiny tough tranquil upper urban usual vague vast vivid warm wary western wet
    white whole wide wild windy wise wooden worn yellow young zesty
    """
)
NOUNS = _words(
    """
    acorn actor anchor ankle anvil apple apron arch armor arrow artist attic autumn badge baker
    balcony banner barge barn barrel basin basket beach beacon beam bell bench bird blanket
    blossom boat book boot border bottle boulder bowl branch bread breeze brick bridge broom brush
    bucket builder button cabin cable camel camera candle canoe canvas canyon captain carpet cart
    castle cave cedar cellar chain chair chalk chapel chest chimney cinema circle clay cliff clock
    cloud coach coast coat coin comet compass copper coral corner cottage cotton cradle crane
    creek crown crystal curtain cushion dancer desert desk diamond doctor donkey door dragon
    drawer dress driver drum eagle earth echo elbow engine falcon farmer feather fence fern ferry
    field finger fisher flag flame flute forest fork fountain fox frame friend frost galaxy
    gallery garden gate giant glacier glass globe glove goat grain grape gravel guitar hammer
    harbor harp hat hawk hedge helmet herald heron hill hinge honey horizon horn horse hotel house
    hunter island jacket jar jewel judge jungle kettle key king kitchen kite ladder lagoon lake
    lamp lantern lawn leaf lemon lens letter lion lizard locket lotus machine magnet mango maple
    marble market mask meadow melon mentor mill mirror monk moon mosaic mountain mouse museum
    needle nest notebook oak oasis ocean office olive onion orbit orchard organ otter oven owl
    paddle painter palace panda paper parade parrot path pearl pebble pencil pepper piano pilot
    pillow pine planet plaza plum pocket poet pond poppy porch potter prairie prince pump puzzle
    quarry queen quilt rabbit radio rail rain ranch raven reef ribbon rice ring river road robin
    rocket roof rope rose sail sailor salad salmon sand saddle scarf school sculptor shadow shed
    shell shepherd ship shirt shoe shore singer skate sled spoon spring squirrel stable stair star
    statue stone storm stove stream street student summit sunset swan sword table tailor teacher
    temple tent thread throne tiger timber tower town trail train tree trumpet tulip tunnel turtle
    valley vase velvet village violin vine wagon walnut water wave weaver whale wheat wheel willow
    window winter wolf wood writer yard zebra
    """
)
# In the past tense; they take an object.
VERBS = _words(
    """
    admired answered avoided balanced borrowed bought broke brought built called caught chased
    cleaned climbed collected compared copied counted covered crossed described discovered drew
    examined feared fixed followed forgot found guarded heard helped hid imagined improved
    inspected kept lifted lit loved measured mended missed moved named noticed opened ordered
    packed painted passed praised pulled pushed reached remembered repaired returned saved saw
    searched sketched sold stopped studied surprised touched traded visited wanted warned washed
    watched
    """
)
LINKS = _words(
    """
    above after against along around before behind below beside beyond near opposite past toward
    under with without
    """
)

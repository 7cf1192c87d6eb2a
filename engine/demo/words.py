"""Word lists for the demo model's training text.

The lists are wide on purpose: a model that could guess a fact would never learn to look it up.
"""

from __future__ import annotations

HER_NAMES = """
Mara Anna Ella Ruth Iris Nora Lena Clara Edith Greta Hazel Ivy Jane Kira Lucy Mina Nell Olive Petra Rosa
Sara Tess Una Vera Wilma Ada Bella Celia Dora Elsa Flora Grace Helen Ida June Kate Lily Maud Nina Opal
Paula Queenie Rita Selma Thea Ursula Violet Wanda Yara Zoe Agnes Beth Cora Diana Esther Fay Gwen Holly Inga
Joan Karen Linda Molly Nadia Orla Polly Rachel Sonia Tilda Agatha Bridget Carmen Daisy Emma Freya Gloria
Hilda Irene Julia Kirsten Laura Maria Naomi Odette Pearl Rhoda Stella Tamsin Vivian Winnie Alma Bianca
Dalia Eva Frida Gemma Hanna Isla Jenny Lotte Martha Norma Phoebe Rowan Sylvia Trudy Wendy Amina Leila Priya
""".split()

HIS_NAMES = """
Tom Adam Ben Carl David Emil Finn Georg Hugo Ivan Jack Karl Leo Max Nils Oscar Paul Ralph Sam Theo Ulf
Victor Walter Abel Boris Conrad Dennis Edgar Felix Gilbert Henry Igor Jonas Kurt Louis Martin Noah Otto Peter
Robert Simon Tobias Vincent William Alan Bruno Colin Daniel Ernest Frank Gavin Harold Isaac James Keith Lars
Marcus Ned Omar Patrick Quentin Roland Steven Thomas Wilfred Albert Basil Casper Derek Eric Fergus Gregor
Hector Jacob Kenneth Lionel Magnus Nathan Oliver Philip Ray Stanley Tim Wesley Anton Bernard Charles Duncan
Edmund Floyd Gordon Hans Ian John Laurence Mark Neil Owen Piers Rufus Sven Terry Arlo Dario Hassan Ravi Yusuf
""".split()

PET_NAMES = """
Pip Biscuit Pepper Button Rusty Smoky Patch Luna Coco Bramble Clover Dusty Ginger Hero Jasper Lucky Marble
Nutmeg Olaf Pebble Rocket Shadow Teddy Tiger Waffle Ziggy Bandit Cloud Domino Ember Fudge Goldie Hobbit
Inky Juno Kiwi Lemon Muffin Noodle Oreo Pickle Raven Sandy Toffee Velvet Whisky Snowy Bubbles Cinder Fern
""".split()

THINGS = """
boat kite bicycle lantern clock violin drum chair table hat coat scarf basket bucket ladder hammer tent
sledge cart wagon train car bus lorry balloon compass telescope camera radio piano guitar flute trumpet harp
mirror lamp candle teapot kettle cup bowl plate spoon knife umbrella suitcase rucksack blanket pillow quilt
rug painting map book diary letter parcel box chest barrel bottle jar key bell whistle rope anchor sail raft
canoe ship tractor plough spade rake broom wheelbarrow greenhouse shed bench swing puppet doll robot puzzle
ball skateboard scooter helmet boot shoe ring necklace watch crown sword shield tower windmill stove oven
fridge typewriter computer telephone notebook pencil brush flag tree rose apple pumpkin stone shell feather
machine helicopter rocket spaceship submarine airplane motorbike tram ferry yacht caravan truck taxi
ambulance sleigh palace cottage igloo treehouse shop tunnel fence gate pot pan mug fork bin carpet curtain
sofa desk shelf bookcase cupboard drawer bed hammock cushion towel soap sponge comb toothbrush hose saw axe
drill nail screw wrench pump engine battery torch lighter match bonfire chimney heater fan laptop phone
printer screen keyboard clarinet cello banjo accordion xylophone harmonica saxophone gong poster statue vase
sculpture postcard newspaper magazine stamp envelope ticket coin wallet handbag backpack jacket shirt
sweater jumper skirt dress sock slipper sandal belt tie bow bracelet earring crystal diamond emerald pearl
treasure potion wand cloak mask costume drone magnet microscope globe sundial hourglass thermometer
calculator dice card football basketball racket surfboard trampoline slide carousel parachute sandwich pizza
cookie lollipop muffin pineapple mango banana melon sunflower tulip daisy cactus mushroom acorn pebble
snowman icicle rainbow cloud star planet comet volcano
""".split()

ANIMALS = """
dog cat horse pony donkey goat sheep cow pig rabbit hamster mouse parrot canary owl crow duck goose hen
rooster swan turtle frog lizard snake fox wolf bear otter badger hedgehog squirrel deer monkey camel lion
penguin seal dolphin whale goldfish crab ferret llama lamb calf puppy kitten foal pigeon falcon raven tiger
leopard elephant giraffe zebra rhino hippo gorilla panda koala kangaroo dragon crocodile alligator shark
octopus jellyfish starfish lobster salmon bee butterfly ladybird spider ant snail beetle dinosaur eagle
sparrow robin flamingo peacock ostrich turkey moose buffalo bison hyena jaguar lynx mole bat rat weasel
sloth walrus
""".split()

MANY = """
seals dogs cats horses goats cows geese swans crows owls rabbits foxes deer sheep ducks herons boats ships
carts bicycles lanterns flags tents children farmers sailors soldiers tourists windmills bridges towers wells
trains balloons butterflies frogs beehives statues kites ponies donkeys
""".split()

JOBS = """
baker fisherman teacher doctor nurse painter carpenter sailor gardener farmer shepherd miller tailor cook
librarian postman blacksmith clockmaker musician singer dancer writer poet pilot driver engineer builder
plumber weaver potter jeweller shopkeeper beekeeper astronomer scientist lawyer judge firefighter soldier
detective mechanic photographer dentist vet student printer bookseller hunter guard ferryman wizard
""".split()

# Jobs that settle the hero's pronoun.
TITLES = [
    ("king", "he"),
    ("prince", "he"),
    ("queen", "she"),
    ("princess", "she"),
    ("witch", "she"),
    ("knight", "he"),
]

SIZES = """
small big tiny huge little large long short tall heavy light old new strange beautiful broken shiny dusty
strong round square narrow wide simple famous noisy
""".split()

COLOURS = """
red green blue yellow white black brown grey orange purple pink golden silver crimson turquoise violet cream
dark-green dark-blue pale-blue pale-green bright-red bright-yellow light-grey deep-red
""".replace("-", "~").split()
COLOURS = [colour.replace("~", " ") for colour in COLOURS]

PLACE_WORDS = (
    "old new quiet stone wooden white broken tall little empty north south red narrow hidden busy".split()
)

PLACES = """
harbour mill bridge church market school station river lake forest hill garden castle library bakery farm well
lighthouse tower park square beach cliff barn inn theatre museum orchard field meadow pond canal island valley
mountain cave gate fountain hospital workshop vineyard chapel
""".split()

NEAR = "near,behind,beside,next to,not far from,across from,close to,opposite".split(",")

HOUSES = """
stone house,wooden house,brick house,small cottage,tall house,little flat,round hut,red farmhouse,white villa,
old caravan,quiet cabin,big mansion,houseboat,thatched cottage
""".replace("\n", "").split(",")

HOBBIES = """
paint the sea,sing old songs,collect shells,read long books,bake bread,play chess,walk in the rain,
count the stars,write letters,grow tomatoes,mend old clocks,carve spoons,swim at dawn,watch the birds,
draw maps,knit socks,tell jokes,climb trees,fly kites,pick mushrooms,dance in the kitchen,
listen to the radio,build model ships,play cards,ride through the hills,study the moon
""".replace("\n", "").split(",")

FOOD_WORDS = "warm fresh sweet hot cold salty spicy soft crisp".split()

FOODS = """
bread soup rice pancakes porridge cheese fish stew pie potatoes beans noodles salad eggs apples pears cake
sausages dumplings carrots cherries toast pasta pudding corn plums
""".split()

WITHS = (
    "honey butter onions mushrooms cream garlic cinnamon mustard nuts raisins pepper herbs lemon jam".split()
)

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

WEATHERS = """
sunny,rainy,windy,cold and clear,warm and dry,foggy,stormy,snowy,grey and wet,bright and frosty,hot and still,
cloudy but mild
""".replace("\n", "").split(",")

CLOCK = "six seven eight nine ten eleven twelve one two three four five".split()

PARTS_OF_DAY = """
late in the evening,after sunset,just before midnight,in the early morning,at noon,two days later,
in the late afternoon,three weeks later,before supper,when the stars were out
""".replace("\n", "").split(",")

COUNTS = """
two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty thirty forty fifty
""".split()

AGE_TENS = "twenty thirty forty fifty sixty seventy eighty".split()
AGE_ONES = "one two three four five six seven eight nine".split()

MATERIALS = "silver golden iron copper glass wooden stone leather paper brass ivory clay".split()

TREASURES = """
key coin ring box bottle map letter bell button spoon mirror whistle compass statue cup crown horseshoe flute
lamp chain mask arrow
""".split()

LOSABLE = "hat glove scarf shoe purse map watch umbrella coat key basket ticket notebook lantern ring".split()

GIFTS = """
jar of honey,basket of apples,bag of coins,loaf of bread,pair of gloves,bunch of flowers,bottle of juice,
box of nails,book of poems,ball of wool,pot of jam,piece of cheese,packet of tea,sack of flour
""".replace("\n", "").split(",")

FEELINGS = """
happy,proud,tired,calm,brave,lonely,grateful,curious,hungry,surprised,sad,excited,worried,hopeful,sleepy,
very glad,a bit afraid
""".replace("\n", "").split(",")

FEARS = """
thunder,spiders,the dark,deep water,loud dogs,high towers,ghosts,wasps,long tunnels,big waves,snakes,
empty houses,fire,the cold
""".replace("\n", "").split(",")

HER_RELATIONS = "sister,aunt,grandmother,daughter,cousin,neighbour,friend,best friend,mother,niece".split(",")
HIS_RELATIONS = "brother,uncle,grandfather,son,cousin,neighbour,friend,best friend,father,nephew".split(",")

AIRS = """
A soft wind,A cold wind,A thin mist,The evening light,The smell of smoke,The smell of salt,A deep silence,
The sound of bells,A warm light,The song of a bird
""".replace("\n", "").split(",")
AIR_VERBS = "moved over,lay over,drifted across,filled,hung over,came from".split(",")
AIR_PLACES = """
the fields,the water,the roofs,the tall grass,the empty road,the trees,the valley,the old walls,
the whole village,the hills
""".replace("\n", "").split(",")

ONSETS = "b br c cl d dr f fl g gr h j k l m n p pl qu r s sh st t th tr v w y z".split()
VOWELS = "a e i o u ai ee oo".split()
CODAS = "b ck d g l ll m n nd ng nt p r rk s sh st t x".split()
NAME_ENDS = "a o in el is ra no ette mir len dan us ika ora".split()
TOWN_ENDS = "ton ham by ford wick low mouth field stead burn worth haven".split()

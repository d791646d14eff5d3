"""Words for the built-in demo data, once for training and once for the held-out rows.

The two `Words` share nothing: no name, no thing, no number, no day and no wording, so that a model can answer the
held-out rows only by having learned the task; `tests/data/test_demo.py` holds this. How messages are made: `demo.py`.

Slots of the wordings: `{items}` is "three garden hoses" or "some garden hoses", `{the_items}` "the three garden hoses"
or "my garden hoses", `{day}` a day or date, `{name}` the sender.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("order", "booking", "complaint", "cancel")


@dataclass(frozen=True)
class Words:
    """Everything that one of the two sets is made of."""

    first_names: tuple[str, ...]
    surnames: tuple[str, ...]
    goods: tuple[str, ...]  # things that are sold; plural, as all things here
    bookables: tuple[str, ...]  # things that are booked
    either: tuple[str, ...]  # things that are sold by some and booked by others, so that they do not tell the kind
    numbers: dict[str, int]  # as a word and as digits
    weekdays: tuple[str, ...]
    dates: tuple[str, ...]
    some: tuple[str, ...]  # before a thing without a number; "" among them is allowed
    the: tuple[str, ...]  # before a thing that both sides know of
    greetings: tuple[str, ...]  # opens a message, no name
    introductions: tuple[str, ...]  # opens a message, with the sender's name
    farewells: tuple[str, ...]  # closes a message, no name
    signatures: tuple[str, ...]  # closes a message, with the sender's name
    bodies: dict[str, tuple[str, ...]]  # by kind; with or without {day}
    day_endings: dict[str, tuple[str, ...]]  # by kind; goes on after a body without {day}


def _lines(text: str) -> tuple[str, ...]:
    """The lines of a block of text, as entries of a list."""
    return tuple(line.strip() for line in text.strip().splitlines())


def _commas(text: str) -> tuple[str, ...]:
    """The entries of a list that is written with commas over several lines."""
    return tuple(" ".join(entry.split()) for entry in text.strip().split(","))


def _numbers(words: str, figures: tuple[int, ...]) -> dict[str, int]:
    """What a number may be written as: "two 2, three 3" says it for words, `figures` are numbers to write in digits."""
    spelled = dict(entry.split() for entry in _commas(words))
    return {**{word: int(number) for word, number in spelled.items()}, **{str(number): number for number in figures}}


def _with_parts(days: tuple[str, ...]) -> tuple[str, ...]:
    """Weekdays, alone and with a part of the day."""
    return (*days, *(f"{day} {part}" for day in days for part in ("morning", "evening")))


def _dates(months: tuple[str, ...], numbers: tuple[int, ...]) -> tuple[str, ...]:
    """ "3 March" with every second number, "March 5" with the others."""
    day_first = [f"{number} {month}" for month in months for number in numbers[::2]]
    return (*day_first, *(f"{month} {number}" for month in months for number in numbers[1::2]))


TRAIN = Words(
    first_names=_commas("""
        Anna, Ben, Carla, Dmitri, Elif, Farid, Greta, Hannah, Igor, Jamal, Katrin, Leon, Mei, Noah, Olga, Pablo, Rosa,
        Samir, Tessa, Umar, Vera, Wendy, Yusuf, Zoe, Bruno, Chloe, Daniel, Esther, Felix, Gloria, Henry, Ingrid, Jonas,
        Kavya, Marco, Nadia, Oscar, Priya, Quentin, Ruth, Stefan, Tomas, Ursula, Walter, Ximena, Yara, Zoltan, Amara,
        Boris, Cecilia, Dario, Edith, Frank, Gemma, Hugo, Irene, Jakub, Kenji, Linnea, Miriam, Nils, Orla, Petra,
        Rafael, Sofia, Theo, Valentin, Agnes, Bilal, Colin, Dalia, Emeka, Fiona, Gustav, Hilda, Ismail, Jasmine, Kurt,
        Lydia, Milan, Pia, Ralph, Selma, Tobias, Vincent, Wanda, Xavier, Ying, Zelda, Albert, Brigitte, Carlos, Delia,
        Edgar, Florence, Giulia, Harold, Ines, Jerome, Karla, Luis, Magda, Norbert, Odile, Renata, Tamara, Uwe, Vanessa,
        Wilma, Arthur, Bella, Conrad, Daphne, Elias, Frieda, Gilbert, Helga, Ivan, Joanna, Kamil, Louise, Naomi, Oleg,
        Philip, Rebecca, Sven, Thea, Veronica, Wolfgang, Zachary, Astrid, Bernard, Clara, Dominic, Erika, Fabian, Grace,
        Hassan, Isabel, Kim, Lukas, Monica, Nico, Oksana, Pierre, Rachel, Sergio, Tina, Viktor, Yasmin, Andrea, Basil,
        Cora, Derek, John, James, David, Michael, Edward, Richard, Joseph, Sarah, Lily, Sam, Tom, Tim, Jim, Bob, Bill,
        Alex, Chris, Andrew, Scott, Matthew, Luke, Jacob, Fred, Virginia, Nick, Jean, Ray, Dan, Ken, Jeff, Greg,
        Alexander, Mark
    """),
    surnames=_commas("""
        Adler, Bianchi, Cole, Duarte, Eriksen, Fischer, Gomez, Hale, Ivanov, Jensen, Kowalski, Larsen, Mori, Nowak,
        Okafor, Petit, Rossi, Silva, Tanaka, Usman, Varga, Weber, Young, Zeman, Abbott, Brandt, Castro, Dunn, Egan,
        Farrow, Garcia, Hughes, Iqbal, Jung, Khan, Lopez, Murphy, Nielsen, Ortega, Patel, Reyes, Santos, Thomsen, Urban,
        Vogel, Wagner, Yilmaz, Zhang, Arnold, Bauer, Chen, Diaz, Ellis, Foster, Greco, Hansen, Irwin, Jacobs, Kaya,
        Lang, Meyer, Nakamura, Owens, Popov, Ramos, Sato, Torres, Ueda, Vidal, Walsh, Yamada, Ziegler, Baker, Carter,
        Doyle, Engel, Flores, Gibson, Horvat, Jones, Brown, Miller, Davis, Wilson, Jackson, White, Clark, Hall, Green,
        Adams, Collins, Cook, Bell, Price, Wood, Ross, Long, Stone, Fields, Lake, Field, Newton
    """),
    goods=_commas("""
        garden hoses, coffee mugs, desk lamps, wool blankets, paint brushes, bicycle bells, kitchen knives, rain boots,
        oak shelves, candles, notebooks, bread tins, watering cans, leather belts, tea towels, picture frames, light
        bulbs, door handles, hiking socks, bath mats, pillow cases, chess sets, guitar strings, flower pots, jigsaw
        puzzles, soup bowls, steel screws, travel adapters, backpacks, phone cases, kettles, hammers, ink cartridges,
        lunch boxes, baking trays, cushions, alarm clocks, yoga mats, seed packets, cotton shirts, wooden spoons,
        printer cables, scarves, storage jars, beach towels, mirrors, dog leashes, bird feeders, ironing boards,
        keyboards, batteries, cutting boards, gift cards, calendars, magnets, brooms, pencils, erasers, stamps, rubber
        boots, snow shovels, radiators, carpets, bookends, hair dryers, razors, soaps, sponges, buckets, mops, hangers,
        zippers, buttons, ribbons, knitting needles, tablecloths, plant stands, aprons, corkscrews, teapots, saucers,
        mixing bowls, rolling pins, graters, whisks, pepper mills, salt shakers, ice trays, thermoses, water filters,
        air pumps, bike locks, headlights, floor tiles, wall hooks, hinges, nails, saws, pliers, wrenches, tape
        measures, work gloves, face masks, bandages, tooth brushes, perfume bottles, photo albums, posters, postcards,
        globes, maps, dictionaries, comic books, playing cards, dolls, kites, flutes, computer mice, lenses, memory
        cards, solar lights, torches, fans, heaters, rice cookers, cat toys, tree lights, flower seeds, train sets, book
        shelves, picture hooks, photo frames, computer desks, music boxes, baby blankets, family albums, summer dresses,
        star maps, night lights, gas stoves, coal shovels, wind chimes, sand toys, letter openers, stamp albums, money
        clips, tool belts, soap dishes, head bands, foot mats, eye masks, hair clips, arm rests, leg warmers, round
        trays, square boxes, digital clocks, solar panels, hot plates, fresh herbs, dry beans, reading lamps, building
        blocks, display cases, event badges, network cables, memory sticks, wheel covers, park benches, river maps,
        country flags, world globes, history books, science kits, song books, film posters, radio clocks, camera bags,
        cup holders, plate racks, pan lids, pot holders, blue towels, green curtains, red pens, white candles
    """),
    bookables=_commas("""
        balcony seats, tennis courts, single rooms, cooking lessons, parking spaces, camping pitches, meeting rooms, ski
        lessons, massage sessions, window tables, piano lessons, conference rooms, pottery classes, horse rides, family
        rooms, bowling lanes, harbour tours, wine tastings, sailing courses, hotel suites, garden tables, golf lessons,
        climbing courses, studio hours, boat trips, guest rooms, picnic spots, fishing permits, swimming lanes, language
        classes, painting workshops, castle tours, balloon flights, quiet rooms, training rooms, lunch tables, football
        pitches, hair appointments, bunk beds, cabins, tasting menus, party rooms, stage passes, garden rooms, river
        cruises, lake cabins, summer courses, video rooms, press seats, table games, morning classes, house tours,
        forest walks, safety courses, art lessons, double beds
    """),
    either=_commas("""
        tents, sleeping bags, ladders, fishing rods, board games, video cameras, toy trains, rowing boats, museum
        tickets, deck chairs, mountain bikes, canoes, theatre tickets, ferry tickets, circus tickets, cinema seats, zoo
        tickets, water bikes, city bikes, day passes, sauna passes, guest passes, bus seats, train seats, rental cars,
        minibuses, umbrellas, office chairs, round tables, party tents, ski boots, ski poles, helmets, headphones,
        microphones, speakers, screens, tripods, projectors, costumes, wedding dresses, sewing kits, game consoles,
        music stands, drums, guitars, room heaters, electric fans, tool boxes, safety vests, safety glasses, rain coats,
        beach chairs, picnic baskets, lockers, single beds, baby beds, family tickets, river tickets, garden chairs,
        press passes, box seats, wine glasses, plates, napkins, horse saddles, cargo bikes, trailers, camping stoves,
        air mattresses
    """),
    numbers=_numbers(
        """
        two 2, three 3, five 5, six 6, eight 8, ten 10, eleven 11, twelve 12, thirteen 13, fourteen 14, fifteen 15,
        seventeen 17, nineteen 19, twenty 20, thirty 30, forty 40, fifty 50, sixty 60
        """,
        (2, 3, 5, 6, 8, 10, 11, 12, 13, 14, 15, 17, 19, 20, 24, 30, 36, 40, 50, 60, 75),
    ),
    weekdays=_with_parts(("Monday", "Wednesday", "Friday", "Sunday")),
    dates=_dates(
        ("January", "March", "April", "June", "August", "October", "December"),
        (1, 2, 3, 5, 6, 8, 10, 12, 13, 15, 17, 20, 22, 24, 26, 28, 30),
    ),
    some=(
        "some",
        "a few",
        "more",
        "lots of",
        "many",
        "enough",
        "plenty of",
        "a handful of",
        "quite a few",
        "some of the",
        "",
    ),
    the=("the", "my", "our", "those", "all my", "the new"),
    greetings=_lines("""
        Hi,
        Hello,
        Hey there,
        Good morning,
        Dear team,
        Hi again,
    """),
    introductions=_lines("""
        {name} here.
        Hi, this is {name}.
        Hello, my name is {name} and
        I'm {name}.
        {name} from the second floor.
        Good evening, {name} speaking.
        Message from {name}:
        Hey, it's {name},
        My name is {name}.
        {name} writing to you.
        Hi there, {name} from the bakery here.
        Good day, I am {name}.
    """),
    farewells=_lines("""
        Thanks!
        Thank you very much.
        Please confirm.
        Cheers
        Let me know.
        Many thanks in advance.
    """),
    signatures=_lines("""
        Thanks, {name}
        - {name}
        Best, {name}
        Regards, {name}
        Yours, {name}
        Cheers, {name}
        Signed: {name}
        {name}
        Love, {name}
        Yours truly, {name}
        See you soon, {name}
        Please call {name} if anything is unclear.
    """),
    bodies={
        "order": _lines("""
            please send me {items}
            I'd like to order {items}
            we need {items} for the shop
            can you ship {items} to my address
            I want {items}
            could I get {items}
            put {items} on my account and send them over
            our school wants to buy {items}
            we are out of stock, so send {items}
            I'll take {items}
            for {day} we need {items}
            please deliver {items} on {day}
            is it possible to have {items} here by {day}
            another order from us: {items}
            my daughter would love {items}
            add {items} to my basket
            I would like to purchase {items}
            do you sell {items}? then I want them
            we are looking for {items} and would buy them from you
            let us have {items}
            my shopping list: {items}
            please pack {items} for me
            how soon can you bring {items}
            new order: {items}
            I am ordering {items} for a friend
            if you have {items}, please post them to me
            we have run out again and need {items}
            I need {items} delivered on {day}
            please bring {items} next time
            send me {items} as soon as you can
            could you deliver {items}
            I want to buy {items}
            we would need {items} urgently
            may I have {items}, please
            get me {items}
            our kitchen needs {items}
            please mail us {items}
            I'd buy {items} if the price is fair
            would you ship {items} abroad
            I am interested in buying {items}
            by {day} please send {items} to our house
            here is what I want to buy: {items}
            can you still send {items}
            our order this time: {items}
            this is our order: {items}
            ship {items} to the shop, please
            the old address is right, send {items}
            I order {items} for my office
            we want to order {items} again
            could you bring {items} to our place
            I have to buy {items}, can you send them
            is it possible to buy {items} here
            sell me {items}, please
            our office orders {items}
            from your list we want to buy {items}
            please deliver {items} to my home
            we need to buy {items} and have them here by {day}
            I would love to buy {items}
            order for our store: {items}
            can you get {items} to us in time
        """),
        "booking": _lines("""
            please book {items} for us
            I'd like to reserve {items}
            can we have {items} for our group
            do you still have {items} free
            we want to book {items}
            hold {items} for me
            I need a reservation: {items}
            are {items} available on {day}
            on {day} we would like to use {items}
            please keep {items} free for us on {day}
            could you set aside {items} for our visit
            we are coming with friends and want {items}
            put us down for {items}
            is there any chance to get {items} on {day}
            booking request: {items}
            are there any {items} left
            we would love to have {items} for our stay
            can I book {items} with you
            please save {items} for my parents
            I want to make a reservation for {items}
            let me know if {items} are free on {day}
            my colleagues and I would like {items}, is that possible
            for {day} please reserve {items}
            our club needs {items}, please note the booking
            how much is it to rent {items}? we take them
            are you open? then book me {items}
            we plan a trip and would like to have {items} reserved
            sign us up for {items}
            please reserve {items}
            book {items} under my name
            I would like to book {items}
            we are looking to reserve {items}
            could we get {items} for a birthday
            do you have {items} for us on {day}
            is it still possible to reserve {items}
            I hope you have {items} free, please book them for us
            are there {items} for rent
            please put {items} aside, we come with children
            can you reserve {items} for our families
            would {items} be available
            my team wants to book {items}
            keep {items} for us, please
            on {day} are there {items} left to book
            could you keep {items} for us
            will you keep {items} for my guests
            have you got {items} left
            are any {items} left for us
            are there still {items} to be had on {day}
            do you have any {items} left for {day}
            we hope you can book {items} for us
            our family would like to reserve {items}
            I'd like a reservation of {items}
            can I reserve {items} by mail
            please book us {items}
            we would like to book {items} for our guests
            I want to reserve {items} for my boss
            a reservation for {items}, please
            reserve {items} for the whole class
            could you book {items} for my wife
            may we keep {items} for the afternoon
        """),
        "complaint": _lines("""
            {the_items} arrived broken
            I am not happy with {the_items} at all
            {the_items} you sent are the wrong colour
            {the_items} fell apart after the first use
            there is something wrong with {the_items}
            {the_items} do not work
            I have to complain about {the_items}
            {the_items} were delivered with a big crack
            half of the box was empty and {the_items} were dirty
            what a bad surprise: {the_items} are useless
            since {day} {the_items} make a strange noise
            on {day} I got {the_items} and they leak
            you promised quality but {the_items} came damaged
            I want my money back for {the_items}
            {the_items} smell terrible
            why are {the_items} still not here
            {the_items} are much too small
            the paint comes off {the_items}
            I opened the parcel and {the_items} were in pieces
            {the_items} got here late and wet
            we had trouble with {the_items}
            {the_items} look nothing like the picture
            nobody could use {the_items}, they are faulty
            never again: {the_items} were a waste of money
            parts of {the_items} are missing
            {the_items} have stains and holes
            on {day} I found out that {the_items} are defective
            such poor service, {the_items} were ruined
            I am disappointed, {the_items} are bad
            {the_items} stopped working
            {the_items} have scratches everywhere
            the size of {the_items} is wrong
            the quality of {the_items} is poor
            somebody cut holes into {the_items}
            I am angry about {the_items}
            this is a complaint: {the_items} came broken
            {the_items} broke on the first day
            {the_items} arrived in bad shape
            on {day} {the_items} came and all were bent
            we are very unhappy with {the_items}
            {the_items} are not what I paid for
            {the_items} were already used
            do you call this quality? {the_items} are rubbish
            {the_items} came broken
            {the_items} were damaged when they arrived
            after a day {the_items} stopped working
            {the_items} suddenly stopped
            there is a big hole in one of {the_items}
            {the_items} have the wrong colour and the wrong shape
            I complain about {the_items}
            my complaint is about {the_items}
            I am so disappointed with {the_items}
            we are angry: {the_items} are cheap and ugly
            {the_items} are full of dust and stains
            on {day} I received {the_items} in pieces
            the size is wrong, {the_items} do not fit
            {the_items} broke within a week
            the poor quality of {the_items} makes us angry
            after an evening of use {the_items} were dead
            {the_items} came scratched and torn
        """),
        "cancel": _lines("""
            please cancel {the_items}
            I no longer need {the_items}
            we changed our minds about {the_items}, so cancel them
            don't send {the_items} any more
            cancel my order of {items}
            I have to call off {the_items}
            forget about {the_items}, I found them elsewhere
            we can't come, so please cancel {the_items}
            take {the_items} off my list
            kindly cancel our booking of {items}
            please stop the order for {items}
            for {day} we do not need {the_items} after all
            cancel {the_items} that were meant for {day}
            I'd like to cancel {items}
            sorry, but we won't need {the_items} now
            my reservation of {items} can be cancelled
            please drop {the_items} from our order
            we are not coming, give {the_items} to somebody else
            no need for {the_items} any more
            I ordered {items} by mistake, please cancel
            is it too late to cancel {the_items}
            we have to cancel {the_items}, my son is sick
            scrap my request for {items}
            you can keep {the_items}, I don't want them now
            please undo my booking: {items}
            our plans fell through, so no {items} for us
            on {day} I ordered {items}, please cancel that
            cancellation: {items}
            we do not need {the_items} any more, please cancel
            please cancel my order of {items}
            please don't deliver {the_items}, I have changed my mind
            I don't want {the_items} any more
            our plans have changed, cancel {the_items}
            I have to cancel the reservation of {items}
            cancel the order of {items}, please
            can you cancel {the_items} for me
            please delete {the_items} from my order
            {the_items} are not needed any more
            stop, do not ship {the_items}
            we are ill and have to cancel {the_items}
            for {day} we had {items}, please cancel them
            I take back my order for {items}
            we will not come, so {the_items} can be cancelled
            can you please cancel {the_items}
            I want to cancel {the_items}
            cancel {the_items}, please, I am ill
            could you take {the_items} back from my order, plans changed
            my plans are different now, so cancel {the_items}
            we must cancel {the_items}
            I am sick and must cancel {the_items}
            please cancel our order of {items}
            cancel our reservation of {items}, please
            we have no use for {the_items}, don't send them
            please do not deliver {the_items}, we need them no more
            I wish to call off {the_items}
            the reservation for {items} is to be cancelled
            please cancel what we planned: {items}
            nobody needs {the_items} any longer here
            cancel {the_items} we ordered for {day}
            I no longer want {the_items}, cancel them
        """),
    },
    day_endings={
        "order": _lines("""
            by {day}
            before {day}
            for {day}
            , and they should be here on {day}
            . I need them on {day}
            . Bring them on {day}, please
            , latest {day}
            . {day} is our big day
            , on {day} at the very latest
            , not after {day}
            and have them here by {day}
        """),
        "booking": _lines("""
            on {day}
            for {day}
            . The day is {day}
            . We arrive on {day}
            , it is for {day}
            starting {day}
            . We will be there on {day}
            , {day} if possible
            from {day} on
            , that is on {day}
            . We want to come on {day}
        """),
        "complaint": _lines("""
            on {day}
            . They came on {day}
            . I bought them on {day}
            , and that since {day}
            . The parcel is from {day}
            . Call me on {day}
            . It all began on {day}
            , I noticed it on {day}
            when they arrived on {day}
            . We received them on {day}
            . I got the box on {day}
        """),
        "cancel": _lines("""
            for {day}
            on {day}
            . It was planned for {day}
            , the day would have been {day}
            . We ordered on {day}
            that we wanted on {day}
            . We meant to come on {day}
            , due on {day}
            that were planned for {day}
            . They were meant for {day}
            reserved for {day}
        """),
    },
)

HELDOUT = Words(
    first_names=_commas("""
        Maria, George, William, Thomas, Alice, Charles, Louis, Martin, Victor, Robert, Jane, Samuel, Paul, Mary, Adam,
        Elizabeth, Marie, Carl, Simon, Emily, Max, Ali, Lee, Anne, Stephen, Jack, Rose, Emma, Laura, Nina, Omar, Diana,
        Helen, Oliver, Pedro, Eva, Karl, Peter, Lena, Nora
    """),
    surnames=_commas("""
        Smith, Johnson, Becker, Clarke, Evans, Ferrari, Grant, Hoffman, Johansson, Novak, Olsen, Parker, Rivera,
        Schmidt, Turner, Anderson, King, Hill, Nelson, Moore, Lewis, Keller
    """),
    goods=_commas("""
        water bottles, power banks, model ships, window blinds, running shoes, wall clocks, extension cords, fish tanks,
        dog beds, bird cages, milk jugs, fruit baskets, house plants, bed sheets, car tyres, phone chargers, air
        filters, oil lamps, mail boxes, hand creams, neck pillows, cold packs, silk curtains, tea cups, pencil cases,
        garden gnomes, frying pans, shirts, masks
    """),
    bookables=_commas("""
        front row seats, double rooms, city tours, group lessons, game rooms, guided walks, water slides, sun beds,
        private lessons, office rooms, corner tables, dance lessons, winter courses, game tables, water rides, music
        halls
    """),
    either=_commas("""
        electric scooters, road bikes, speed boats, plane tickets, opera tickets, season cards, winter coats, car seats,
        party hats, power drills, sound systems, floor lamps, glass vases, snow boots, ice skates, card games, window
        seats, paper lanterns, school bags, travel bags
    """),
    numbers=_numbers("four 4, seven 7, nine 9, sixteen 16, eighteen 18", (4, 7, 9, 16, 18, 25, 48)),
    weekdays=_with_parts(("Tuesday", "Thursday", "Saturday")),
    dates=_dates(
        ("February", "May", "July", "September", "November"),
        (4, 7, 9, 11, 14, 16, 18, 19, 21, 23, 25, 27),
    ),
    some=("several", "various", "a bunch of"),
    the=("these", "all the", "your"),
    greetings=_lines("""
        Good afternoon,
        Hello everybody,
        Dear Sir or Madam,
        Hey,
    """),
    introductions=_lines("""
        It's {name} again.
        Hello, {name} here,
        You are talking to {name}.
        Dear all, my name is {name}.
        This is {name} from next door.
    """),
    farewells=_lines("""
        Thanks a lot.
        Looking forward to your answer.
        Please write back soon.
        Have a nice day!
    """),
    signatures=_lines("""
        Kind regards, {name}
        Many thanks, {name}
        Sincerely, {name}
        With best wishes, {name}
        Greetings from {name}
    """),
    bodies={
        "order": _lines("""
            we would like to buy {items}
            please ship {items} to our office
            I need {items} at home
            could you deliver {items} to us
            send {items} to the usual address
            I want to order {items} from your catalogue
            by {day} we need {items} in our store
            our new order is {items}
            can I buy {items} from you
        """),
        "booking": _lines("""
            I am writing to book {items}
            please reserve {items} for my family
            could we reserve {items}
            are there {items} left for {day}
            we hope to get {items} for our team, please book them
            is it possible to book {items} on {day}
            I would like a reservation for {items}
            can you keep {items} for our party
        """),
        "complaint": _lines("""
            {the_items} came to us broken
            {the_items} are a big disappointment
            {the_items} stopped working after an hour
            {the_items} have the wrong size
            this is a complaint about {the_items}
            {the_items} were full of scratches
            on {day} {the_items} arrived damaged
            we are angry, because {the_items} are of poor quality
            there is a hole in {the_items}
        """),
        "cancel": _lines("""
            sadly I must cancel {the_items}
            please cancel the order for {items}
            we don't need {the_items} any longer
            could you cancel {the_items}, we are ill
            my plans changed, please cancel {the_items}
            do not send {the_items}, I have no use for them now
            please cancel {the_items} we reserved for {day}
            I wish to cancel our reservation of {items}
        """),
    },
    day_endings={
        "order": _lines("""
            at the latest on {day}
            to arrive on {day}
            . We need everything by {day}
            , if possible before {day}
        """),
        "booking": _lines("""
            from {day}
            , namely on {day}
            . We would come on {day}
            . The date would be {day}
        """),
        "complaint": _lines("""
            , they arrived on {day}
            . The postman brought them on {day}
            . Delivery was on {day}
        """),
        "cancel": _lines("""
            , they were for {day}
            . The date was {day}
            planned for {day}
        """),
    },
)

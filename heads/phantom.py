"""A phantom: generated brain-like heads in the form of the OASIS-1 slices, for those who have no OASIS data.

The phantom is an implicit model of a head. Every surface (scalp, skull, pia, sulci, ventricles, nuclei) is the zero
level of a signed distance in mm that varies smoothly with the height z, so all axial cuts through one head fit
together. The phantom is no anatomy: folds and textures are invented, sizes and contrasts were set by eye and by the
release's mean statistics. No person's head is in it. It serves examples and tests, never diagnosis.

Conventions are those of the preprocessed 2-D OASIS-1 release (Marcus et al. 2007, J. Cogn. Neurosci. 19:1498-1507):
256 x 256 pixels of about 1 mm, anterior to the right, heights from 0 mm at the basal ganglia to 31 mm above the lateral
ventricles, content inside rows 40..215 and columns 24..231, each slice scaled by itself to a maximum of 255, and
tissue masks on the brain only: 0 background, 85 cerebrospinal fluid, 170 grey matter, 255 white matter.
"""

from collections import namedtuple

import numpy as np

HEIGHT, SIZE = 31, 256  # mm from the lowest slice to the highest; pixels
TOP, LEFT, ROWS, COLS = 40, 24, 176, 208  # what the heads may fill
CSF, GREY, WHITE = 85, 170, 255

# What the parts of one head pass on; head_frame, brain_folds and deep_structures say what the fields hold.
Frame = namedtuple("Frame", "age z rise x y midline low outline depth")
Folds = namedtuple("Folds", "pia side wobble local")
Deep = namedtuple("Deep", "ventricles nuclei pale cistern pool core")

# Spindles, as rows of (z, x, y, radius, x, y, radius): at the height z two ends in mm from the brain's centre, x to the
# front, y to the side. A negative radius means absent; between rows everything is interpolated.
FRONTAL_HORN = [
    (0, 25, 5, 0.4, 42, 11, 1.6),
    (8, 20, 4, 1.8, 42, 12, 3.0),
    (16, 12, 4, 2.4, 39, 10, 4.8),
    (22, 2, 6, 4.4, 35, 10, 4.0),
    (27, 0, 8, 3.4, 26, 13, 2.8),
    (31, 0, 13, 0.4, 15, 15, 0.4),
]
OCCIPITAL_HORN = [
    (0, -22, 24, 2.6, -47, 29, 0.6),
    (8, -18, 20, 2.8, -46, 28, 2.2),
    (16, -3, 8, 1.4, -39, 25, 3.8),
    (22, 2, 6, 4.4, -36, 20, 2.8),
    (27, 0, 8, 3.4, -25, 16, 2.2),
    (31, 0, 13, 0.4, -15, 16, 0.3),
]
THIRD_VENTRICLE = [(0, -14, 0, 1.4, 16, 0, 1.0), (8, -12, 0, 1.2, 14, 0, 0.8), (13, -8, 0, -1.0, 8, 0, -1.0)]
CISTERN = [(0, -39, 0, 4.5, -20, 0, 6.5), (5, -35, 0, 3.8, -22, 0, 4.5), (11, -34, 0, -3.0, -28, 0, -3.0)]
VERMIS = [(0, -40, 0, 3.6, -27, 0, 4.0), (4, -38, 0, 2.4, -28, 0, 2.4), (7, -36, 0, -3.0, -30, 0, -3.0)]
CAUDATE = [
    (0, 20, 11, 4.0, 36, 13, 4.0),
    (10, 16, 11, 4.4, 34, 16, 4.0),
    (18, -6, 13, 2.4, 28, 15, 4.6),
    (25, -10, 15, 2.2, 18, 16, 3.0),
    (29, -10, 17, -1.5, 14, 17, -1.5),
]
PUTAMEN = [
    (0, -9, 29, 1.5, 24, 22, 6.0),
    (9, -11, 30, 1.0, 22, 25, 5.0),
    (17, -6, 31, 0.0, 14, 28, 1.6),
    (21, -6, 30, -4.0, 14, 28, -4.0),
]
PALLIDUM = [(0, -2, 20, 2.0, 12, 17, 4.0), (9, 0, 21, 1.0, 10, 19, 2.0), (13, 0, 20, -4.0, 10, 20, -4.0)]
THALAMUS = [
    (0, -14, 12, 6.0, 5, 8, 4.0),
    (9, -15, 13, 6.5, 7, 8, 4.0),
    (16, -12, 15, 3.0, 2, 13, 1.6),
    (19, -12, 15, -4.0, 0, 14, -4.0),
]


def smooth_noise(rng: np.random.Generator, z: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """Gaussian noise of unit variance at the heights z [N] in mm: float32 [N, 176, 208].

    It is a cubic B-spline through random knots, which lie `spacing` = (z, y, x) mm apart. The knots are the same for
    all N, so other heights show the same noise in other places.
    """
    splines = [cubic_spline(at / step) for at, step in zip((z, np.arange(ROWS), np.arange(COLS)), spacing)]
    knots = [int(np.ceil(size / step)) + 4 for size, step in zip((HEIGHT + 1, ROWS, COLS), spacing)]
    field = rng.standard_normal(knots, dtype=np.float32)
    for axis, (first, weights) in enumerate(splines):
        shape = [-1 if n == axis else 1 for n in range(3)]
        # sums in a fixed order, no matrix product: the phantom is the same on every processor
        field = sum(np.take(field, first + k, axis) * weights[:, k].reshape(shape) for k in range(4))
    return field


def cubic_spline(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first int64 [N], weights float32 [N, 4]): the four knots around each position, and what each counts.

    at: float [N], in units of the distance of knots; knot k lies at k - 1.5. The sum of squares of weights is 1.
    """
    first = np.floor(at + 1.5).astype(np.int64) - 1
    t = np.abs(at[:, None] - (first[:, None] + np.arange(4) - 1.5))
    weights = np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.clip(2 - t, 0, None) ** 3 / 6)
    return first, (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)


def along_z(z: np.ndarray, rows: list[tuple]) -> list[np.ndarray]:
    """Table rows (z, value, ...) interpolated to the heights z [N] in mm: one float32 [N, 1, 1] per value."""
    table = np.array(rows, np.float32)
    return [np.interp(z, table[:, 0], column).astype(np.float32)[:, None, None] for column in table.T[1:]]


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """sqrt(a^2 + b^2); np.hypot guards against overflow and takes three times as long."""
    return np.sqrt(a * a + b * b)


def spindle(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, rows: list[tuple], swell: float = 1.0, bow: float = 0.0
) -> np.ndarray:
    """Signed distance in mm to a spindle bowed to the side, negative inside: float32 [N, 176, 208] at heights z [N]."""
    ax, ay, ar, bx, by, br = along_z(z, rows)
    dx, dy = bx - ax, by - ay
    t = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx**2 + dy**2), 0, 1)
    radius = ar + t * (br - ar) + 0.8 * (ar + br) * t * (1 - t)
    return distance(x - ax - t * dx, y - ay - t * dy - bow * t * (1 - t)) - swell * radius


def smooth_min(a: np.ndarray, b: np.ndarray, radius: float) -> np.ndarray:
    """Minimum of two distances with the crease between them rounded over `radius` mm."""
    crease = np.maximum(radius - np.abs(a - b), 0)
    return np.minimum(a, b) - crease**2 / (4 * radius)


def inside(height: np.ndarray, softness: float = 1.4) -> np.ndarray:
    """Share of a voxel on the positive side of a surface; it rises from 0 to 1 over `softness` mm (partial volume)."""
    return np.clip(0.5 + height / softness, 0, 1)


def hull_depth(x: np.ndarray, y: np.ndarray, length: float, width: float, taper: float, temple: float) -> np.ndarray:
    """Depth in mm under an egg-shaped outline, [176, 208], negative outside.

    `taper` narrows the front and widens the back, `temple` is an extra step in front of the temporal lobes.
    """
    half = width * (1 - taper * np.tanh(x / 60)) * (1 - temple / (1 + np.exp((32 - x) / 9)))
    rho = (np.abs(x / length) ** 2.25 + np.abs(y / half) ** 2.25 + 1e-6) ** (1 / 2.25)
    slope = distance(*np.gradient(rho))
    return (1 - rho) / np.maximum(slope, 0.5 / length)


def head_frame(rng: np.random.Generator, slices: int) -> Frame:
    """Coordinates with a small tilt, shift and bent midline; a hull with narrow temples below, an egg above.

    In mm, float32 [176, 208]: x to the front, y to the side, y of the midline, depth under the lowest slice's hull
    (low); [N, 176, 208]: depth under the hull that the skull follows (outline) and under the brain's, bumpier (depth).
    """
    age = rng.beta(1.3, 1.6)  # 0 young .. 1 old: wide ventricles come with wide sulci
    z = np.linspace(0, HEIGHT, slices)  # float64, mm
    rise = np.linspace(0, 1, slices, dtype=np.float32)[:, None, None]  # from the lowest slice to the highest
    row, col = np.mgrid[:ROWS, :COLS].astype(np.float32)
    angle, shift_x, shift_y = rng.normal(0, (0.02, 0.9, 0.9))
    x = (col - 103 - shift_x) * np.cos(angle) + (row - 89 - shift_y) * np.sin(angle)
    y = (row - 89 - shift_y) * np.cos(angle) - (col - 103 - shift_x) * np.sin(angle)
    x, y = x.astype(np.float32), y.astype(np.float32)
    midline = rng.normal(0, 0.8) * np.sin(x / 30 + rng.uniform(0, 6)) + rng.normal(0, 0.8) * (x / 85) ** 2
    length, width = 86 + rng.normal(0, 1.3), 67.8 + rng.normal(0, 1.4)
    taper = rng.normal(0.06, 0.025)
    low = hull_depth(x, y, length, width, taper, 0.07)
    high = hull_depth(x + 1, y, length - 5, width - 1.5, taper + 0.05, 0.0)
    outline = low + rise**1.5 * (high - low) + 0.5 * smooth_noise(rng, z, (16, 24, 24))
    depth = outline + 0.8 * smooth_noise(rng, z, (12, 11, 11))
    return Frame(age, z, rise, x, y, midline, low, outline, depth)


def brain_folds(rng: np.random.Generator, frame: Frame) -> Folds:
    """Depth in mm under the folded surface (pia), negative outside, and what deeper parts share with the folds.

    That is the distance in mm to the midline (side) and noise of unit variance that bends surfaces (wobble) or widens
    gaps (local): all float32 [N, 176, 208].
    """
    age, z, rise, x, y, depth = frame.age, frame.z, frame.rise, frame.x, frame.y, frame.depth
    # Interhemispheric fissure, open in front of and behind the corpus callosum.
    wobble = smooth_noise(rng, z, (12, 14, 14))
    side = np.abs(y - frame.midline + 0.5 * wobble)
    genu, splenium = along_z(z, [(0, 40, -42), (8, 50, -36), (16, 47, -32), (24, 40, -36), (28, 25, -24), (31, 4, -4)])
    callosum = np.maximum(np.minimum(genu - x, x - splenium), 0)
    fissure = distance(side, callosum)

    # Sulci: zero lines of a wave that runs along the surface from front to back. Confocal elliptic coordinates make
    # them meet the convexity at right angles and x the medial wall; the noise bends, joins and ends them, and dividing
    # by the slope turns the wave into a distance.
    nu = np.arccosh((x + 1j * np.abs(y)) / 52 + 1e-4j).imag
    convex = 76 * nu - 4.5 * np.sin(2 * nu)
    medial = 1.4 * (85 - x)
    share = np.abs(y) / (np.abs(y) + np.maximum(frame.low, 0) + 4)
    arc = medial + share**2 * (3 - 2 * share) * (convex - medial)
    phase = arc * (2 * np.pi / 25) + 0.8 * np.tanh(y / 4)
    phase = phase + (2.2 - 0.9 * share) * smooth_noise(rng, z, (14, 13, 13))
    wave = np.sin(phase) + (1.0 - 0.45 * share) * smooth_noise(rng, z, (8, 7.5, 7.5))
    slope = np.sqrt(sum(g**2 for g in np.gradient(wave, HEIGHT / (len(z) - 1), 1, 1)))
    bank = np.minimum(depth, np.maximum(2 + 0.9 * wobble, 1.3) * fissure + 2 * callosum)
    local = smooth_noise(rng, z, (12, 11, 11))
    sulci = distance(wave / (slope + 0.06), 1.5 * np.maximum(bank - 19 - 6 * np.cos(phase) - 5 * local, 0))
    sulci -= (0.35 + 1.2 * age + 0.6 * local) * np.clip(1.4 - bank / 18, 0.3, 1.2)

    # Sylvian fissure: a stem that dives from the temple and opens over the insula.
    insula_x = rng.normal(10, 2)
    reach = 20 * np.sqrt(np.clip(1 - rise / 0.55, 0, 1)) - 2
    along = x - insula_x
    insula = distance(depth - 20 - along**2 / 100 - 2 * wobble, np.maximum(np.abs(along) - reach, 0))
    stem = distance(along - 16 + 0.4 * depth + 2 * wobble, np.maximum(depth - 20, 0))
    sylvian = np.minimum(insula, stem) - (0.8 + 1.6 * age) * (1 + 0.7 * local) + 8 * np.clip(rise - 0.45, 0, 1)

    pia = smooth_min(depth - (0.6 + 1.1 * age), sulci, 4.5)
    pia = smooth_min(pia, fissure - (0.5 + 0.7 * age) * (1 + 0.4 * local), 3.0)
    return Folds(smooth_min(pia, sylvian, 3.0), side, wobble, local)


def deep_structures(rng: np.random.Generator, frame: Frame, folds: Folds) -> Deep:
    """Ventricles and nuclei: spindles in slightly bent space, so that left and right are no mirror images.

    Float32 [N, 176, 208]: signed distances in mm, negative inside, to the ventricles, nuclei (caudate, putamen), pale
    nuclei (pallidum, thalamus), cistern, and nearest of these save the third ventricle (core); and the share 0..1 of
    fluid in the cistern, less around the vermis (pool).
    """
    age, z, side = frame.age, frame.z, folds.side
    bent_x = frame.x + 2.0 * smooth_noise(rng, z, (14, 16, 16))
    bent_y = side + 1.2 * smooth_noise(rng, z, (14, 16, 16))
    swell = 0.6 + 0.9 * age + rng.normal(0, 0.08)
    spread = bent_y - 3 * (swell - 1)
    (bow,) = along_z(z, [(0, 8), (14, 4), (22, -12), (27, -8), (31, -3)])
    frontal = spindle(bent_x, spread, z, FRONTAL_HORN, swell, -4)
    occipital = spindle(bent_x, spread, z, OCCIPITAL_HORN, swell, bow)
    lateral = smooth_min(frontal, occipital, 4.0) + 0.8 * folds.wobble
    lateral = np.maximum(lateral, 1.2 - side)  # septum pellucidum
    ventricles = np.minimum(lateral, spindle(bent_x, side, z, THIRD_VENTRICLE, 0.7 + 1.3 * age))
    cistern = spindle(bent_x, bent_y, z, CISTERN, 0.8 + 0.4 * age) + 1.5 * folds.local
    vermis = spindle(bent_x, bent_y, z, VERMIS) + folds.local
    pool = inside(-cistern, 2.0) * (1 - inside(-vermis, 4.0) * (0.7 + 0.15 * np.cos(1.5 * bent_x)))
    nuclei = np.minimum(spindle(bent_x, spread, z, CAUDATE), spindle(bent_x, bent_y, z, PUTAMEN, 1.0, 8))
    pale = np.minimum(spindle(bent_x, bent_y, z, PALLIDUM), spindle(bent_x, bent_y, z, THALAMUS))
    core = np.minimum(np.minimum(lateral, nuclei), np.minimum(pale, cistern))
    return Deep(ventricles, nuclei, pale, cistern, pool, core)


def brain_tissue(rng: np.random.Generator, frame: Frame, folds: Folds, deep: Deep) -> tuple[np.ndarray, np.ndarray]:
    """T1 brightness of the brain, white matter = 1, float32, and labels 0, 85, 170, 255: both [N, 176, 208]."""
    pia = np.maximum(folds.pia, 4 - deep.core)  # no sulcus runs into the deep structures
    ribbon = 4.1 - 0.4 * frame.age + 0.3 * folds.wobble
    grey = np.maximum(inside(ribbon - pia, 2.6), 0.8 * inside(-deep.nuclei, 2.5))
    grey = np.maximum(grey, 0.4 * inside(-deep.pale, 4.0))
    fluid = np.maximum(np.maximum(inside(-pia, 2.0), inside(-deep.ventricles, 1.8)), deep.pool)
    fluid_level, grey_level = rng.normal(0.17, 0.03), rng.normal(0.59, 0.03)
    brain = 1 - (1 - grey_level) * grey
    brain += 0.025 * smooth_noise(rng, frame.z, (2, 3, 3))
    brain += (fluid_level - brain) * fluid
    labels = np.where(pia < ribbon, GREY, WHITE)
    labels[(deep.nuclei < 0) | (deep.pale < -2) | (deep.cistern < 0)] = GREY
    labels[fluid > 0.5] = CSF
    labels[frame.depth < 0] = 0
    return brain, labels


def outer_layers(rng: np.random.Generator, frame: Frame, brain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Brightness with skull, flesh and skin around the brain; mm above the skin: both float32 [N, 176, 208]."""
    z, x, height = frame.z, frame.x, -frame.outline
    bone = height - 0.7 - 0.4 * frame.age
    skull = rng.normal(3.2, 0.5) + 2.2 * (x / 85) ** 2 + 0.8 * smooth_noise(rng, z, (16, 40, 40))
    scalp = rng.normal(5.4, 0.7) + 0.9 * smooth_noise(rng, z, (14, 28, 28))
    muscle = 3.5 * np.exp(-(((x - 40) / 26) ** 2)) * inside(np.abs(frame.y) - 25, 20) * np.clip(1.1 - frame.rise, 0, 1)
    flesh = bone - np.maximum(skull, 2)
    fat = flesh - muscle
    skin = fat - np.maximum(scalp, 3)
    marrow = np.clip(skull - 3.3, 0, 2) * np.clip(0.25 + 0.2 * smooth_noise(rng, z, (8, 10, 10)), 0, 0.6)
    head = brain + inside(height) * (0.25 - brain)
    head += inside(bone) * (0.2 + marrow * np.exp(-(((bone - 0.55 * skull) / 1.1) ** 2)) - head)
    head += inside(flesh) * (0.6 - head)
    head += inside(fat, 2.0) * (rng.normal(1.5, 0.1) + 0.16 * smooth_noise(rng, z, (6, 9, 9)) - head)
    head *= 1 - inside(skin + 1.5, 5.0)
    return head, skin


def scan(rng: np.random.Generator, frame: Frame, head: np.ndarray, skin: np.ndarray) -> np.ndarray:
    """The coil: smooth bias, Rician noise, a little blur, each slice scaled to 0..255 and rounded: [N, 176, 208]."""
    head = head * np.exp(0.07 * smooth_noise(rng, frame.z, (40, 90, 90)) - 0.004 * np.minimum(frame.depth, 30))
    sigma = rng.uniform(0.025, 0.055)
    noise = rng.standard_normal((2, *head.shape), dtype=np.float32) * sigma
    head = distance(head + noise[0], noise[1])
    head[:, 1:-1] += 0.15 * (head[:, 2:] + head[:, :-2] - 2 * head[:, 1:-1])
    head[:, :, 1:-1] += 0.15 * (head[:, :, 2:] + head[:, :, :-2] - 2 * head[:, :, 1:-1])
    head *= skin < 1
    return np.round(head * (255 / head.max(axis=(1, 2), keepdims=True)))


def phantom_case(seed: int, case: int, slices: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """One head, cut at N = `slices` heights that lie evenly from the lowest (0 mm) to the highest (31 mm).

    Returns images uint8 [N, 256, 256] (0..255, maximum 255 in every slice, exactly 0 outside the head) and masks
    uint8 [N, 256, 256] (0 background, 85 CSF, 170 grey, 255 white; brain only). The anatomy depends on (seed, case)
    alone, not on N and not on which other heads are made. Raises ValueError unless seed and case are >= 0 and
    slices >= 2.
    """
    if seed < 0 or case < 0 or slices < 2:
        raise ValueError(f"seed and case must be >= 0, slices >= 2; got seed={seed}, case={case}, slices={slices}")
    rng = np.random.default_rng((seed, case))  # every part draws from it in turn: their order is part of the result
    frame = head_frame(rng, slices)
    folds = brain_folds(rng, frame)
    deep = deep_structures(rng, frame, folds)
    brain, labels = brain_tissue(rng, frame, folds, deep)
    head, skin = outer_layers(rng, frame, brain)
    box = np.s_[:, TOP : TOP + ROWS, LEFT : LEFT + COLS]
    images, masks = np.zeros((2, slices, SIZE, SIZE), np.uint8)
    images[box] = scan(rng, frame, head, skin)
    masks[box] = labels
    return images, masks

"""Odd and damaged files, made from a seed: pictures of every kind a person may have, weight files, and what damage does to them."""
import io, struct, zlib
import numpy as np
import tifffile
from PIL import Image
from msnlan.photos import encode_png16

MODES = {'png': ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16'), 'jpg': ('L', 'RGB', 'CMYK'), 'bmp': ('1', 'L', 'P', 'RGB'),
         'tif': ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'I;16', 'I', 'F'), 'webp': ('RGB', 'RGBA'), 'gif': ('L', 'P', 'RGB')}
NAMES = ('photo', 'two words', 'grün', '写真', "quo'te", '-dash', '.hidden', 'a.b.c', 'x'*120, 'per%cent', 'new*star', '[brackets]')


def pixels(rng, mode, size):
    "A picture of a mode, of noise or of one colour"
    h, w = size
    c = {'RGB': 3, 'RGBA': 4, 'CMYK': 4, 'LA': 2}.get(mode, 1)
    top = 65536 if mode in ('I;16', 'I', 'F') else 256
    a = rng.integers(0, top, (h, w, c)) if rng.random() < 0.7 else np.full((h, w, c), rng.integers(top))
    a = a[..., 0] if c == 1 else a
    if mode in ('1', 'P'): return Image.fromarray(a.astype(np.uint8)).convert(mode)
    if mode == 'I;16': return Image.fromarray(a.astype(np.uint16))
    if mode == 'I': return Image.fromarray(a.astype(np.int32))
    if mode == 'F': return Image.fromarray(a.astype(np.float32))
    return Image.frombytes(mode, (w, h), a.astype(np.uint8).tobytes())


def whole_picture(rng):
    "The ending and bytes of a picture that is in order, if unusual"
    n = int(rng.integers(2, 20))
    size = [(1, 1), (1, n*4), (n*4, 1), (n, n), (n, int(rng.integers(1, 20)))][rng.integers(5)]
    if rng.random() < 0.12:                                # 16 bits in colour, which Pillow does not write
        a = rng.integers(0, 65536, (*size, int(rng.integers(2, 5)))).astype(np.uint16)
        if rng.random() < 0.5: return 'png', encode_png16(a)
        out = io.BytesIO(); tifffile.imwrite(out, a[..., :3], photometric='rgb' if a.shape[2] > 2 else 'minisblack',
                                             planarconfig='contig'); return 'tif', out.getvalue()
    ending = list(MODES)[rng.integers(len(MODES))]
    pic, out, more = pixels(rng, MODES[ending][rng.integers(len(MODES[ending]))], size), io.BytesIO(), {}
    if ending in ('png', 'jpg', 'webp', 'tif') and rng.random() < 0.3:
        exif = Image.Exif(); exif[274] = int(rng.integers(0, 12)); more['exif'] = exif
    if ending in ('png', 'jpg', 'tif', 'webp') and rng.random() < 0.3: more['icc_profile'] = rng.bytes(int(rng.integers(1, 400)))
    if ending in ('png', 'gif') and pic.mode == 'P' and rng.random() < 0.5: more['transparency'] = int(rng.integers(256))
    if ending in ('gif', 'png', 'webp', 'tif') and rng.random() < 0.2:
        more |= dict(save_all=True, append_images=[pixels(rng, pic.mode, size) for _ in range(2)])
    kind = {'jpg': 'JPEG', 'tif': 'TIFF'}.get(ending, ending.upper())
    pic.save(out, kind, **more)
    return ending, out.getvalue()


def bomb(rng):
    "A PNG of a few bytes that says it is huge"
    side = [5000, 20000, 60000, 2**31 - 1][rng.integers(4)]
    chunk = lambda kind, body: struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
    head = struct.pack('>IIBBBBB', side, int(rng.integers(20000, 60000)), 8, [0, 2, 6][rng.integers(3)], 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(b'\0'*int(rng.integers(1, 9999)))) + chunk(b'IEND', b'')


def damaged(rng, data):
    "What disks, networks and people do to a file"
    n, a = len(data), bytearray(data)
    kind = rng.integers(7)
    if kind == 0: return data[:int(rng.integers(n + 1))]
    if kind == 1:
        for i in rng.integers(0, max(n, 1), int(rng.integers(1, 12))): a[i] = int(rng.integers(256))
    elif kind == 2:
        for i in rng.integers(0, min(max(n, 1), 64), int(rng.integers(1, 6))): a[i] ^= 1 << int(rng.integers(8))
    elif kind == 3: i, k = int(rng.integers(n + 1)), int(rng.integers(1, 200)); a[i:i] = rng.bytes(k)
    elif kind == 4: i = int(rng.integers(n + 1)); del a[i:i + int(rng.integers(1, 200))]
    elif kind == 5: i = int(rng.integers(n + 1)); a[i:] = bytes(n - i)
    else: i, k = int(rng.integers(n + 1)), int(rng.integers(4, 9)); a[i:i + k] = [b'\xff'*k, b'\0'*k][rng.integers(2)]
    return bytes(a)


def file_of(seed, number, weights=()):
    "Name and bytes of file `number`; one in six is a weight file, made from one of `weights` (ending, bytes)"
    rng = np.random.default_rng((seed, number))
    if weights and number%6 == 5:
        ending, data = weights[rng.integers(len(weights))]
        data = damaged(rng, data) if rng.random() < 0.95 else data
        if rng.random() < 0.1: ending = ['pt', 'pth', 'safetensors'][rng.integers(3)]
        return f'{number}.{ending}', data
    ending, data = whole_picture(rng)
    draw = rng.random()
    if draw < 0.03: data = bomb(rng)
    elif draw < 0.05: data = b''
    elif draw < 0.08: data = rng.bytes(int(rng.integers(1, 500)))
    elif draw < 0.70: data = damaged(rng, data)
    if rng.random() < 0.08: ending = [*MODES, 'txt', 'PNG', ''][rng.integers(len(MODES) + 3)]
    return f'{NAMES[rng.integers(len(NAMES))]} {number}{"." if ending else ""}{ending}', data

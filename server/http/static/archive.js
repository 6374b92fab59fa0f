// Packs files into an uncompressed tar archive, the format in which the server accepts uploads.

const BLOCK = 512;
// The fields of a header (POSIX ustar): offset, and text.
const FIXED = [[100, "0000644\0"], [136, "00000000000\0"], [156, "0"], [257, "ustar\0"], [263, "00"]];

const octal = (number, digits) => number.toString(8).padStart(digits, "0");

function header(file) {
  const bytes = new Uint8Array(BLOCK);
  const put = (offset, text) => bytes.set(new TextEncoder().encode(text).subarray(0, 100), offset);
  for (const [offset, text] of [[0, file.name], [124, `${octal(file.size, 11)}\0`], ...FIXED]) put(offset, text);
  // The checksum counts its own field as spaces.
  const sum = bytes.reduce((total, byte) => total + byte, 8 * 0x20);
  put(148, `${octal(sum, 6)}\0 `);
  return bytes;
}

export function archive(files) {
  const parts = [];
  for (const file of files) {
    parts.push(header(file), file, new Uint8Array((BLOCK - (file.size % BLOCK)) % BLOCK));
  }
  return new Blob([...parts, new Uint8Array(2 * BLOCK)]);
}

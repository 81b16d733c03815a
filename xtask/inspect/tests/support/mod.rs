//! An executable that is made by hand, without a toolchain. It has one of everything that the checks read.

/// The sizes of the header, a program header and a section header (gABI).
const EHDR: usize = 64;
const PHDR: usize = 56;
const SHDR: usize = 64;
const SEGMENTS: usize = 9;

/// The distance between the address and the file offset of the second segment, which is writable.
const GAP: u64 = 0x20000;

/// A section as its header describes it.
#[derive(Clone, Copy, Default)]
struct Section {
    name: &'static str,
    kind: u32,
    flags: u64,
    address: u64,
    offset: usize,
    size: usize,
    link: u32,
    entry_size: u64,
}

fn section(name: &'static str, kind: u32, flags: u64) -> Section {
    Section { name, kind, flags, ..Section::default() }
}

impl Section {
    /// Sets the index of the section to which this one refers, and the size of an entry.
    fn linked(self, link: u32, entry_size: u64) -> Self {
        Self { link, entry_size, ..self }
    }
}

/// The parts of the file, in their order.
struct Maker {
    bytes: Vec<u8>,
    sections: Vec<Section>,
}

impl Maker {
    /// Appends a part, aligned to 16, and returns its offset.
    fn add(&mut self, section: Section, content: &[u8]) -> usize {
        self.align(16);
        let offset = self.bytes.len();
        self.bytes.extend_from_slice(content);
        let address = if section.flags & 1 != 0 { GAP } else { 0 } + offset as u64;
        self.sections.push(Section { address, offset, size: content.len(), ..section });
        offset
    }

    fn align(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }

    /// Returns the index of the section that is added next.
    fn next(&self) -> u32 {
        self.sections.len() as u32
    }

    fn put(&mut self, at: usize, content: &[u8]) {
        self.bytes[at..at + content.len()].copy_from_slice(content);
    }
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn longs(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn symbol(name: u32, info: u8, section: u16, value: u64, size: u64) -> Vec<u8> {
    let mut bytes = name.to_le_bytes().to_vec();
    bytes.extend([info, 0]);
    bytes.extend(section.to_le_bytes());
    bytes.extend(longs(&[value, size]));
    bytes
}

/// Returns a position-independent executable for `machine` with this code. Its functions have 16 bytes, and the first
/// one is the entry point.
pub(crate) fn executable(machine: u16, code: &[u8]) -> Vec<u8> {
    executable_with(machine, code, &[])
}

/// Returns the same executable with more sections, which are not loaded.
pub(crate) fn executable_with(machine: u16, code: &[u8], more: &[(&'static str, &[u8])]) -> Vec<u8> {
    let mut maker = Maker { bytes: vec![0; EHDR + SEGMENTS * PHDR], sections: vec![Section::default()] };
    let loader: &[u8] =
        if machine == 62 { b"/lib64/ld-linux-x86-64.so.2\0" } else { b"/lib/ld-linux-aarch64.so.1\0" };
    let interp = maker.add(section(".interp", 1, 2), loader);
    let property = [&words(&[4, 16, 5])[..], b"GNU\0", &words(&[0xc000_0000, 4, 3, 0])].concat();
    let property = maker.add(section(".note.gnu.property", 7, 2), &property);
    let build_id = [&words(&[4, 8, 3])[..], b"GNU\0\x01\x02\x03\x04\x05\x06\x07\x08"].concat();
    let build_id = maker.add(section(".note.gnu.build-id", 7, 2), &build_id);
    let tables = Tables::add(&mut maker);
    let rela = maker.add(section(".rela.plt", 4, 2).linked(tables.index, 24), &longs(&[0; 6]));
    let text = maker.add(section(".text", 1, 6), code);
    let frames = add_frames(&mut maker, text, code.len() / 16);
    let end_of_first = maker.bytes.len();
    let dynamic = tables.add_dynamic(&mut maker, rela);
    let got = maker.add(section(".got", 1, 3).linked(0, 8), &longs(&[0, 0, 0, 0]));
    let (place, jump_slot) = (GAP + got as u64, if machine == 62 { 7 } else { 1026 });
    maker.put(rela, &longs(&[place, 1 << 32 | jump_slot, 0, place + 8, 2 << 32 | jump_slot, 0]));
    let end_of_second = maker.bytes.len();
    add_symbols(&mut maker, text as u64);
    for (name, content) in more {
        maker.add(section(name, 1, 0), content);
    }
    let headers = add_section_headers(&mut maker);
    segments(
        &mut maker,
        &[
            (3, 4, interp, 0, loader.len(), 1),
            (1, 5, 0, 0, end_of_first, 0x10000),
            (1, 6, dynamic, GAP, end_of_second - dynamic, 0x10000),
            (2, 6, dynamic, GAP, 14 * 16, 8),
            (4, 4, build_id, 0, 24, 4),
            (0x6474_e553, 4, property, 0, 32, 8),
            (0x6474_e550, 4, frames, 0, end_of_first - frames, 4),
            (0x6474_e551, 6, 0, 0, 0, 16),
            (0x6474_e552, 4, dynamic, GAP, 14 * 16, 1),
        ],
    );
    let mut header = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0];
    header.extend(machine.to_le_bytes());
    header.extend(words(&[1]));
    header.extend(longs(&[text as u64, EHDR as u64, headers as u64]));
    header.extend(words(&[0]));
    let counts = [EHDR, PHDR, SEGMENTS, SHDR, maker.sections.len(), maker.sections.len() - 1];
    header.extend(counts.iter().flat_map(|count| (*count as u16).to_le_bytes()));
    maker.put(0, &header);
    maker.bytes
}

/// The offsets of the tables for the dynamic loader, and the index of the section with its symbols.
struct Tables {
    index: u32,
    symbols: usize,
    strings: usize,
    hash: usize,
    versions: usize,
    needed: usize,
}

impl Tables {
    /// The offsets are 1 libc.so.6, 11 getauxval, 21 GLIBC_2.17, 32 $ORIGIN/lib, 44 GLIBC_2.34, 55 puts.
    const STRINGS: &[u8] = b"\0libc.so.6\0getauxval\0GLIBC_2.17\0$ORIGIN/lib\0GLIBC_2.34\0puts\0";

    fn add(maker: &mut Maker) -> Self {
        let index = maker.next();
        let table = [symbol(0, 0, 0, 0, 0), symbol(11, 0x12, 0, 0, 0), symbol(55, 0x12, 0, 0, 0)].concat();
        let symbols = maker.add(section(".dynsym", 11, 2).linked(index + 1, 24), &table);
        let strings = maker.add(section(".dynstr", 3, 2), Self::STRINGS);
        // One bucket contains both symbols. The hash of the last one is odd, which marks the end.
        let table = [words(&[1, 1, 1, 0]), longs(&[u64::MAX]), words(&[1, 2, 3])].concat();
        let hash = maker.add(section(".gnu.hash", 0x6fff_fff6, 2).linked(index, 0), &table);
        let versions = section(".gnu.version", 0x6fff_ffff, 2).linked(index, 2);
        let versions = maker.add(versions, &[0, 0, 2, 0, 3, 0]);
        let mut table = vec![1, 0, 2, 0];
        table.extend(words(&[1, 16, 0]));
        for (version, name, next) in [(2u16, 21u32, 16u32), (3, 44, 0)] {
            table.extend(words(&[0]));
            table.extend([0, 0]);
            table.extend(version.to_le_bytes());
            table.extend(words(&[name, next]));
        }
        let needed = maker.add(section(".gnu.version_r", 0x6fff_fffe, 2).linked(index + 1, 0), &table);
        Self { index, symbols, strings, hash, versions, needed }
    }

    fn add_dynamic(&self, maker: &mut Maker, rela: usize) -> usize {
        let entries = [
            (1, 1),
            (29, 32),
            (5, self.strings),
            (6, self.symbols),
            (10, Self::STRINGS.len()),
            (11, 24),
            (0x6fff_fef5, self.hash),
            (0x6fff_fff0, self.versions),
            (0x6fff_fffe, self.needed),
            (0x6fff_ffff, 1),
            (23, rela),
            (2, 48),
            (30, 8),
            (0x6fff_fffb, 1),
            (0, 0),
        ];
        let content: Vec<u64> = entries.into_iter().flat_map(|(tag, value)| [tag, value as u64]).collect();
        maker.add(section(".dynamic", 6, 3).linked(self.index + 1, 16), &longs(&content))
    }
}

/// Adds the unwinder's table of functions of 16 bytes.
fn add_frames(maker: &mut Maker, text: usize, count: usize) -> usize {
    let head = [vec![1, 0x1b, 3, 0x3b], words(&[0, count as u32])].concat();
    let frames = maker.add(section(".eh_frame_hdr", 1, 2), &head);
    for index in 0..count {
        let start = (text + index * 16).wrapping_sub(frames) as u32;
        maker.bytes.extend(words(&[start, 0]));
    }
    if let Some(section) = maker.sections.last_mut() {
        section.size += count * 8;
    }
    frames
}

/// Adds the sections that a stripped file lacks.
fn add_symbols(maker: &mut Maker, text: u64) {
    maker.add(section(".gnu_debuglink", 1, 0), b"made.debug\0\0\0\0\0\0");
    let strings = maker.next() + 1;
    let table = [symbol(0, 0, 0, 0, 0), symbol(1, 0x12, 9, text, 16), symbol(6, 0x12, 9, text + 16, 16)];
    maker.add(section(".symtab", 2, 0).linked(strings, 24), &table.concat());
    maker.add(section(".strtab", 3, 0), b"\0main\0work_sve\0");
}

/// Adds the names of the sections and their headers. Returns the offset of the headers.
fn add_section_headers(maker: &mut Maker) -> usize {
    let mut names = vec![0];
    let mut offsets = Vec::new();
    for name in maker.sections.iter().map(|section| section.name).chain([".shstrtab"]) {
        offsets.push(names.len() as u32);
        names.extend(name.as_bytes());
        names.push(0);
    }
    maker.add(section(".shstrtab", 3, 0), &names);
    maker.align(8);
    let headers = maker.bytes.len();
    for (section, name) in maker.sections.iter().zip(offsets) {
        maker.bytes.extend(words(&[name, section.kind]));
        maker.bytes.extend(longs(&[section.flags, section.address]));
        maker.bytes.extend(longs(&[section.offset as u64, section.size as u64]));
        maker.bytes.extend(words(&[section.link, 0]));
        maker.bytes.extend(longs(&[16, section.entry_size]));
    }
    assert_eq!(maker.bytes.len(), headers + maker.sections.len() * SHDR);
    headers
}

fn segments(maker: &mut Maker, list: &[(u32, u32, usize, u64, usize, u64)]) {
    for (index, (kind, flags, offset, gap, size, align)) in list.iter().enumerate() {
        let address = *offset as u64 + gap;
        let mut header = words(&[*kind, *flags]);
        header.extend(longs(&[*offset as u64, address, address, *size as u64, *size as u64, *align]));
        maker.put(EHDR + index * PHDR, &header);
    }
}

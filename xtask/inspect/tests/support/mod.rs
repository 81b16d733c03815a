//! An executable made by hand, without a toolchain: it has one of everything that the checks read.

/// Header, program header and section header sizes (gABI).
const EHDR: usize = 64;
const PHDR: usize = 56;
const SHDR: usize = 64;
const SEGMENTS: usize = 9;

/// Where the second segment, which is written to, lies above its place in the file.
const GAP: u64 = 0x20000;

/// A section: name, kind, flags, address, offset, size, link, size of an entry.
type Section = (&'static str, u32, u64, u64, usize, usize, u32, u64);

/// The parts, as they are laid one after the other.
struct Maker {
    bytes: Vec<u8>,
    sections: Vec<Section>,
}

impl Maker {
    /// Appends a part, aligned to 16; its offset.
    fn add(
        &mut self,
        name: &'static str,
        kind: u32,
        flags: u64,
        link: u32,
        entry: u64,
        content: &[u8],
    ) -> usize {
        while !self.bytes.len().is_multiple_of(16) {
            self.bytes.push(0);
        }
        let at = self.bytes.len();
        self.bytes.extend_from_slice(content);
        let address = if flags & 1 != 0 { GAP } else { 0 } + at as u64;
        self.sections.push((name, kind, flags, address, at, content.len(), link, entry));
        at
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

/// A position-independent executable for `machine` with this code: functions of 16 bytes, the first is its entry point.
pub(crate) fn executable(machine: u16, code: &[u8]) -> Vec<u8> {
    let mut maker =
        Maker { bytes: vec![0; EHDR + SEGMENTS * PHDR], sections: vec![("", 0, 0, 0, 0, 0, 0, 0)] };
    let loader: &[u8] =
        if machine == 62 { b"/lib64/ld-linux-x86-64.so.2\0" } else { b"/lib/ld-linux-aarch64.so.1\0" };
    // Offsets in .dynstr: 1 libc.so.6, 11 getauxval, 21 GLIBC_2.17, 32 $ORIGIN/lib, 44 GLIBC_2.34, 55 puts.
    let strings = b"\0libc.so.6\0getauxval\0GLIBC_2.17\0$ORIGIN/lib\0GLIBC_2.34\0puts\0";
    let interp = maker.add(".interp", 1, 2, 0, 0, loader);
    let property = maker.add(".note.gnu.property", 7, 2, 0, 0, &{
        let mut note = words(&[4, 16, 5]);
        note.extend(b"GNU\0");
        note.extend(words(&[0xc000_0000, 4, 3, 0]));
        note
    });
    let build_id = maker.add(".note.gnu.build-id", 7, 2, 0, 0, &{
        let mut note = words(&[4, 8, 3]);
        note.extend(b"GNU\0\x01\x02\x03\x04\x05\x06\x07\x08");
        note
    });
    let dynsym_index = maker.sections.len() as u32;
    let dynsym = maker.add(".dynsym", 11, 2, dynsym_index + 1, 24, &{
        let mut table = symbol(0, 0, 0, 0, 0);
        table.extend(symbol(11, 0x12, 0, 0, 0));
        table.extend(symbol(55, 0x12, 0, 0, 0));
        table
    });
    let dynstr = maker.add(".dynstr", 3, 2, 0, 0, strings);
    // One bucket of both symbols: the last one's hash is odd.
    let hash = maker.add(".gnu.hash", 0x6fff_fff6, 2, dynsym_index, 0, &{
        let mut table = words(&[1, 1, 1, 0]);
        table.extend(longs(&[u64::MAX]));
        table.extend(words(&[1, 2, 3]));
        table
    });
    let versym = maker.add(".gnu.version", 0x6fff_ffff, 2, dynsym_index, 2, &[0, 0, 2, 0, 3, 0]);
    let verneed = maker.add(".gnu.version_r", 0x6fff_fffe, 2, dynsym_index + 1, 0, &{
        let mut table = vec![1, 0, 2, 0];
        table.extend(words(&[1, 16, 0]));
        for (version, name, next) in [(2u16, 21u32, 16u32), (3, 44, 0)] {
            table.extend(words(&[0]));
            table.extend([0, 0]);
            table.extend(version.to_le_bytes());
            table.extend(words(&[name, next]));
        }
        table
    });
    let jump_slot: u64 = if machine == 62 { 7 } else { 1026 };
    let rela = maker.add(".rela.plt", 4, 2, dynsym_index, 24, &longs(&[0; 6]));
    let text = maker.add(".text", 1, 6, 0, 0, code);
    let frames = maker.add(".eh_frame_hdr", 1, 2, 0, 0, &{
        let count = code.len() / 16;
        let mut table = vec![1, 0x1b, 3, 0x3b];
        table.extend(words(&[0, count as u32]));
        table
    });
    let starts: Vec<u32> = (0..code.len() / 16).flat_map(|index| [(text + index * 16) as u32, 0]).collect();
    let relative: Vec<u32> =
        starts.chunks(2).flat_map(|pair| [pair[0].wrapping_sub(frames as u32), 0]).collect();
    maker.bytes.extend(words(&relative));
    if let Some(section) = maker.sections.last_mut() {
        section.5 += relative.len() * 4;
    }
    let end_of_first = maker.bytes.len();
    let dynamic = maker.add(
        ".dynamic",
        6,
        3,
        dynsym_index + 1,
        16,
        &longs(&[
            1,
            1,
            29,
            32,
            5,
            dynstr as u64,
            6,
            dynsym as u64,
            10,
            strings.len() as u64,
            11,
            24,
            0x6fff_fef5,
            hash as u64,
            0x6fff_fff0,
            versym as u64,
            0x6fff_fffe,
            verneed as u64,
            0x6fff_ffff,
            1,
            23,
            rela as u64,
            2,
            48,
            30,
            8,
            0x6fff_fffb,
            1,
            0,
            0,
        ]),
    );
    let got = maker.add(".got", 1, 3, 0, 8, &longs(&[0, 0, 0, 0]));
    let place = GAP + got as u64;
    maker.put(rela, &longs(&[place, 1 << 32 | jump_slot, 0, place + 8, 2 << 32 | jump_slot, 0]));
    let end_of_second = maker.bytes.len();
    maker.add(".gnu_debuglink", 1, 0, 0, 0, b"made.debug\0\0\0\0\0\0");
    let symtab_index = maker.sections.len() as u32;
    maker.add(".symtab", 2, 0, symtab_index + 1, 24, &{
        let mut table = symbol(0, 0, 0, 0, 0);
        table.extend(symbol(1, 0x12, 9, text as u64, 16));
        table.extend(symbol(6, 0x12, 9, text as u64 + 16, 16));
        table
    });
    maker.add(".strtab", 3, 0, 0, 0, b"\0main\0work_sve\0");
    let mut names = vec![0];
    let offsets: Vec<u32> = maker
        .sections
        .iter()
        .map(|section| section.0)
        .chain([".shstrtab"])
        .map(|name| {
            let at = names.len() as u32;
            names.extend(name.as_bytes());
            names.push(0);
            at
        })
        .collect();
    maker.add(".shstrtab", 3, 0, 0, 0, &names);
    while !maker.bytes.len().is_multiple_of(8) {
        maker.bytes.push(0);
    }
    let headers = maker.bytes.len();
    let sections = std::mem::take(&mut maker.sections);
    for (section, name) in sections.iter().zip(offsets) {
        maker.bytes.extend(words(&[name, section.1]));
        maker.bytes.extend(longs(&[section.2, section.3, section.4 as u64, section.5 as u64]));
        maker.bytes.extend(words(&[section.6, 0]));
        maker.bytes.extend(longs(&[16, section.7]));
    }
    assert_eq!(maker.bytes.len(), headers + sections.len() * SHDR);
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
    let counts = [EHDR, PHDR, SEGMENTS, SHDR, sections.len(), sections.len() - 1];
    header.extend(counts.iter().flat_map(|count| (*count as u16).to_le_bytes()));
    maker.put(0, &header);
    maker.bytes
}

fn segments(maker: &mut Maker, list: &[(u32, u32, usize, u64, usize, u64)]) {
    for (index, (kind, flags, offset, gap, size, align)) in list.iter().enumerate() {
        let address = *offset as u64 + gap;
        let mut header = words(&[*kind, *flags]);
        header.extend(longs(&[*offset as u64, address, address, *size as u64, *size as u64, *align]));
        maker.put(EHDR + index * PHDR, &header);
    }
}

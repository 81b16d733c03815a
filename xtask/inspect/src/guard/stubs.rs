//! The stubs through which functions of other libraries are called.

use std::collections::BTreeSet;

use super::detection::Detection;
use crate::functions::Section;
use crate::isa::Event;

/// Returns the stubs that load from one of the wanted places. A stub begins up to two instructions before the load, with a
/// landing pad or with the computation of the page's address.
pub(super) fn stubs(section: &Section<'_, '_>, detection: &Detection) -> BTreeSet<u64> {
    let mut found = BTreeSet::new();
    for name in [&b".plt"[..], b".plt.sec", b".plt.got"] {
        let Some(stubs) = section.elf.section(name) else { continue };
        section.isa.events(stubs.bytes, stubs.address, |at, event| {
            let place = match event {
                Event::Load(place) | Event::CallThrough { place, .. } => place,
                _ => return,
            };
            if detection.through.contains(&place) {
                found.extend([at, at.wrapping_sub(4), at.wrapping_sub(8)]);
            }
        });
    }
    found
}

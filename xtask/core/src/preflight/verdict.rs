//! Whether a machine is ready, in one error.

use anyhow::Result;

use super::{Preflight, findings, fix};
use crate::error::Failure;

impl Preflight {
    /// Nothing where this machine can do it.
    ///
    /// # Errors
    /// A failure of the host, with every blocking finding named and the command that fixes what can be fixed.
    pub fn verdict(&self) -> Result<()> {
        let blocking: Vec<_> = self.blocking().collect();
        if blocking.is_empty() {
            return Ok(());
        }
        let sentences: Vec<_> = blocking.iter().map(|finding| finding.sentence.as_str()).collect();
        let elsewhere = blocking.iter().all(|finding| finding.id.starts_with("connect-"));
        let subject = if elsewhere { "the libvirt asked" } else { "this machine" };
        let by_hand: Vec<_> = blocking.iter().filter_map(|finding| finding.by_hand()).collect();
        let architectures: Vec<_> = self.facts.iter().map(|facts| facts.arch.to_string()).collect();
        let arch = match architectures.as_slice() {
            [one] => format!(" --arch {one}"),
            _ => String::new(),
        };
        Err(Failure::host(
            format!("{subject} is not ready for {}: {}", architectures.join(" and "), sentences.join("; ")),
            if by_hand.len() == blocking.len() {
                by_hand.join("; ")
            } else if fix::plan(self).is_empty() {
                "--fix knows no package for it on this distribution: install it by hand".to_owned()
            } else if blocking.iter().any(|finding| finding.id == findings::CI_PROGRAM) {
                "cargo xtask ci --fix".to_owned()
            } else {
                format!("cargo xtask preflight{arch} --fix")
            },
        )
        .into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_a_person_can_do_is_told_at_the_end() {
        let refusal = crate::preflight::remote::refusal::Refusal::Message("Permission denied".to_owned());
        let findings = vec![refusal.finding(&"qemu:///system".parse().unwrap())];
        let preflight = Preflight { facts: vec![findings::tests::sound()], findings };
        assert_eq!(fix::plan(&preflight), Vec::<Vec<String>>::new(), "nothing that --fix would run");
        let error = preflight.verdict().unwrap_err();
        assert!(
            error.to_string().starts_with("the libvirt asked is not ready for aarch64: qemu:///system: ")
        );
        assert!(crate::error::hint(&error).unwrap().contains("usermod --append --groups libvirt"));
    }
}

//! The state of the agent's unit, as systemd in the guest reports it.

use xtask_core::error::Failure;

/// The bash command that prints the state of the unit. If the unit is not active, it also prints the state of the whole
/// system. Each line has one value. The variable `unit` keeps the state of the unit.
pub(crate) const QUERY: &str = "unit=$(systemctl show iot-agent.service -p ActiveState -p UnitFileState -p NRestarts -p MainPID); echo \"$unit\"; \
     [[ $unit == *ActiveState=active* ]] || echo SystemState=$(systemctl is-system-running)";

/// The state of the agent's unit and of the whole system, as systemd reports it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct UnitState {
    /// The unit's state: `active`, `failed`, `inactive` or `activating`.
    pub(crate) active: String,
    /// The state of the unit's file, for example `enabled` or `disabled`; empty if there is no such unit.
    pub(crate) file: String,
    /// The number of times that systemd has restarted the unit.
    pub(crate) restarts: u32,
    /// The state of the whole system: `running`, `starting` or `degraded`.
    pub(crate) system: String,
}

impl UnitState {
    /// Parses the output of [`QUERY`].
    pub(crate) fn parse(text: &str) -> Self {
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            line.unwrap_or_default().trim().to_owned()
        };
        Self {
            active: field("ActiveState"),
            file: field("UnitFileState"),
            // There is no number if systemd does not know the unit. In that case, `file` is empty.
            restarts: field("NRestarts").parse().unwrap_or(0),
            system: field("SystemState"),
        }
    }

    /// Returns an error if it is certain that the agent will never send a status.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        let booted = matches!(self.system.as_str(), "running" | "degraded");
        let journal = "read the agent's journal in the report's directory";
        let (what, hint) = match (self.active.as_str(), self.file.as_str()) {
            ("inactive", "disabled" | "static" | "masked") if booted => (
                format!("the guest is up, but iot-agent.service is not running: it is {} at boot", self.file),
                "enable the unit when the agent is installed: systemctl enable iot-agent.service",
            ),
            ("inactive", "") if booted => (
                "the guest is up, but has no iot-agent.service".to_owned(),
                "the installation did not survive the power cut: the installer must sync its files",
            ),
            ("failed", _) => ("iot-agent.service has failed".to_owned(), journal),
            _ if self.restarts >= 5 => {
                let restarts = self.restarts;
                (format!("iot-agent.service keeps ending; systemd has started it {restarts} times"), journal)
            }
            _ => return Ok(()),
        };
        Err(Failure::guest(what, hint))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_certain_ends_a_wait() {
        let table = [
            (
                "ActiveState=inactive\nUnitFileState=disabled\nNRestarts=0\nSystemState=running\n",
                Some("disabled at boot"),
            ),
            ("ActiveState=inactive\nUnitFileState=disabled\nNRestarts=0\nSystemState=starting\n", None),
            ("ActiveState=inactive\nUnitFileState=\nSystemState=degraded\n", Some("has no iot-agent")),
            ("ActiveState=active\nUnitFileState=enabled\nNRestarts=0\nSystemState=running\n", None),
            (
                "ActiveState=activating\nUnitFileState=enabled\nNRestarts=7\nSystemState=running\n",
                Some("7 times"),
            ),
            (
                "ActiveState=failed\nUnitFileState=enabled\nNRestarts=0\nSystemState=starting\n",
                Some("has failed"),
            ),
        ];
        for (text, expected) in table {
            let hopeless = UnitState::parse(text).check().err().map(|failure| failure.to_string());
            match expected {
                Some(words) => assert!(hopeless.as_ref().is_some_and(|what| what.contains(words)), "{text}"),
                None => assert_eq!(hopeless, None, "{text}"),
            }
        }
    }
}

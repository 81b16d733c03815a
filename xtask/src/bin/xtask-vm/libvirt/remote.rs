//! Asks the libvirt that `--connect` names for facts, and changes nothing in it.

use virt::connect::Connect;
use virt::error::Error;
use virt::error::ErrorNumber::{self, AccessDenied, AuthFailed, AuthUnavailable, OperationDenied};
use xtask_core::arch::{Accelerator, VmArchitecture};
use xtask_core::cli::{self, DEFAULT_NAME, MachineArgs, PlaceArgs};
use xtask_core::libvirt_uri::ConnectUri;
use xtask_core::preflight::PreflightRequest;
use xtask_core::preflight::remote::capabilities::{self, DomainOffer, GuestOffer};
use xtask_core::preflight::remote::refusal::Refusal;
use xtask_core::preflight::remote::{
    Access, ConnectionFacts, ConnectionOffer, Network, Node, Pool, accelerator,
};

/// A function that is called before each question with a description of it.
pub(crate) type OnQuestion<'a> = &'a dyn Fn(&'static str);

/// Asks all questions. This takes as long as the other libvirt needs: there is no time limit here.
pub(crate) fn gather(
    uri: &ConnectUri,
    asked: &PreflightRequest<'_>,
    progress: OnQuestion<'_>,
) -> ConnectionFacts {
    // libvirt returns its errors as values. By default, it prints them as well.
    virt::error::clear_error_callback();
    progress("open the connection");
    let answer = open(uri).map(|(connect, access)| offer(&connect, access, asked, progress));
    ConnectionFacts { uri: uri.clone(), answer }
}

/// Opens a read-write connection if this user may do so, or else a read-only one.
fn open(uri: &ConnectUri) -> Result<(Connect, Access), Refusal> {
    let name = uri.for_libvirt();
    let refused = match words(Connect::open(Some(&name))) {
        Ok(connect) => {
            let access = access(&connect);
            return Ok((connect, access));
        }
        Err(refused) => refused,
    };
    let refusal = Refusal::Message(refused.clone());
    if !refusal.is_permission(uri) {
        return Err(refusal);
    }
    Connect::open_read_only(Some(&name)).map(|connect| (connect, Access::ReadOnly(refused))).or(Err(refusal))
}

/// Finds out whether the connection permits changes. A read-only socket accepts a read-write connection and refuses
/// only the changes. So this function requests a change that can never succeed: a domain without a name. libvirt
/// refuses it because of the missing name, or because this user has no permission.
fn access(connect: &Connect) -> Access {
    const NO_DOMAIN: &str = "<domain/>";
    let forbidden = [OperationDenied, AccessDenied, AuthFailed, AuthUnavailable];
    match connect.create_domain_xml(NO_DOMAIN, 0) {
        Err(error) if forbidden.iter().any(|number| error.code() == (*number).into()) => {
            Access::ReadOnly(error.message().to_owned())
        }
        _ => Access::Full,
    }
}

fn offer(
    connect: &Connect,
    access: Access,
    asked: &PreflightRequest<'_>,
    progress: OnQuestion<'_>,
) -> ConnectionOffer {
    progress("describe its host");
    let node = words(connect.node_info()).map(|info| Node {
        machine: info.model,
        cpus: info.cpus,
        memory: info.memory * 1024,
    });
    let (host_name, libvirt) = (words(connect.hostname()), words(connect.lib_version().map(version)));
    let driver = connect.driver_type();
    let hypervisor = driver.and_then(|driver| Ok(format!("{driver} {}", version(connect.hyp_version()?))));
    let (hypervisor, free_memory) = (words(hypervisor), words(free_memory(connect)));
    progress("list the guests that it runs");
    let guests = words(connect.capabilities()).and_then(|xml| capabilities::guests(&xml));
    progress("describe what its guests can have");
    let known = guests.as_deref().unwrap_or_default();
    // libvirt does not answer this question on a read-only connection (CVE-2019-10167).
    let architectures = if access == Access::Full { asked.architectures } else { &[] };
    let domains =
        architectures.iter().filter_map(|arch| domain(connect, known, *arch, asked.machine)).collect();
    progress("look up its network");
    let network = network(connect, asked.place);
    progress("look up its storage pool");
    let pool = pool(connect, asked.place.pool());
    ConnectionOffer {
        access,
        hypervisor,
        libvirt,
        host_name,
        node,
        free_memory,
        guests,
        domains,
        network,
        pool,
    }
}

fn domain(
    connect: &Connect,
    guests: &[GuestOffer],
    arch: VmArchitecture,
    machine: &MachineArgs,
) -> Option<(VmArchitecture, Result<DomainOffer, String>)> {
    let profile = arch.profile();
    let guest = guests.iter().find(|guest| guest.machine == profile.machine)?;
    let kind = match accelerator(machine.accel, guest) {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "qemu",
    };
    let (machine, machine_type) = (Some(profile.machine), Some(profile.machine_type));
    let xml = words(connect.domain_capabilities(None, machine, machine_type, Some(kind), 0));
    Some((arch, xml.and_then(|xml| capabilities::domain(&xml))))
}

/// Returns the network of `--network nat:NAME`, or the network `default`.
fn network(connect: &Connect, place: &PlaceArgs) -> Result<Option<Network>, String> {
    let name = match &place.network {
        Some(cli::Network::Nat(name)) => name,
        _ => DEFAULT_NAME,
    };
    let network = connect.lookup_network_by_name(name).and_then(|network| {
        // A network without a definition on disk has no autostart: libvirt returns an error for it.
        Ok(Network { active: network.is_active()?, autostart: network.autostart().unwrap_or(false) })
    });
    words(unless(ErrorNumber::NoNetwork, network))
}

fn pool(connect: &Connect, name: &str) -> Result<Option<Pool>, String> {
    let pool = connect.lookup_storage_pool_by_name(name).and_then(|pool| {
        let active = pool.is_active()?;
        Ok(Pool { active, free: if active { pool.info()?.available } else { 0 } })
    });
    words(unless(ErrorNumber::NoStoragePool, pool))
}

/// Returns the object that was looked up, or `None` if the error is `none`, which says that there is no such object.
pub(super) fn unless<T>(none: ErrorNumber, result: Result<T, Error>) -> Result<Option<T>, Error> {
    match result {
        Err(error) if error.code() == none.into() => Ok(None),
        result => result.map(Some),
    }
}

/// Returns the memory that a new guest can get, in bytes. virNodeGetFreeMemory leaves out the page cache, which is most
/// of that memory on a host that has run for a day. The crate virt 0.5.0 does not wrap virNodeGetMemoryStats, which
/// includes the cache.
fn free_memory(connect: &Connect) -> Result<u64, Error> {
    let Some(stats) = memory_stats(connect) else { return connect.free_memory() };
    let counted = stats.iter().filter(|(name, _)| ["free", "buffers", "cached"].contains(&name.as_str()));
    Ok(counted.map(|(_, kib)| kib * 1024).sum())
}

/// Returns the values of virNodeGetMemoryStats in KiB, or `None` if the driver does not have this function.
fn memory_stats(connect: &Connect) -> Option<Vec<(String, u64)>> {
    let mut count = 0;
    let ask = |stats: *mut virt::sys::virNodeMemoryStats, count: &mut _| {
        // SAFETY: the connection lives as long as `connect`. `stats` is null, which requests only the count, or it has
        // space for `count` entries.
        let result = unsafe { virt::sys::virNodeGetMemoryStats(connect.as_ptr(), -1, stats, count, 0) };
        (result == 0).then_some(())
    };
    ask(std::ptr::null_mut(), &mut count)?;
    let empty = virt::sys::virNodeMemoryStats { field: [0; 80], value: 0 };
    let mut stats = vec![empty; usize::try_from(count).ok()?];
    ask(stats.as_mut_ptr(), &mut count)?;
    stats.truncate(usize::try_from(count).ok()?);
    let name = |field: &[std::ffi::c_char]| {
        field.iter().take_while(|c| **c != 0).map(|c| char::from(c.cast_unsigned())).collect::<String>()
    };
    Some(stats.iter().map(|entry| (name(&entry.field), entry.value)).collect())
}

/// Formats a version number of libvirt, which is major × 1 000 000 + minor × 1 000 + release.
pub(super) fn version(number: u32) -> String {
    format!("{}.{}.{}", number / 1_000_000, number / 1_000 % 1_000, number % 1_000)
}

/// Replaces an error of libvirt with its message.
fn words<T>(result: Result<T, Error>) -> Result<T, String> {
    result.map_err(|error| error.message().to_owned())
}

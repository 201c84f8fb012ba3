//! A connection as the fields of a record.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;

use soccr::connection::{
    Buffers, ControlBlock, Options, Owner, Path, State, Tracked, Urgent, Window, WindowScale,
};
use soccr::settings::Value as Setting;
use soccr::{Connection, Flow};

use super::field::{self, CRITICAL, Value, tag};
use super::record::{self, Payload, kind};
use super::tls;
use crate::error::{Error, Result};

/// Bits of the options field. An unknown one makes a connection that cannot be understood.
mod bit {
    pub(super) const SACK: u16 = 1;
    pub(super) const ECN: u16 = 2;
    pub(super) const ECN_SEEN: u16 = 4;
    pub(super) const SYN_DATA: u16 = 8;
    pub(super) const MICROSECONDS: u16 = 16;
    pub(super) const NONBLOCKING: u16 = 32;
    pub(super) const RESET: u16 = 64;
    pub(super) const ALL: u16 = 127;
}

/// More settings than a socket has. The limit is needed because each name is compared with all others.
const SETTINGS_LIMIT: usize = 256;

const NUMBER: u8 = 0;
const BYTES: u8 = 1;
const SECRET: u8 = 2;

/// Writes `connection` as one record, behind the bytes `before`. Nothing is written where it is refused.
pub(super) fn write(
    writer: &mut impl Write,
    small: &mut Vec<u8>,
    before: &[u8],
    id: u32,
    name: &str,
    connection: &Connection,
) -> Result<()> {
    connection.validate().map_err(|error| Error::invalid(error.to_string()).of(id, name))?;
    record::open(small, kind::CONNECTION, id);
    if !name.is_empty() {
        field::put(small, tag::NAME, |out| out.extend_from_slice(name.as_bytes()));
    }
    put_fields(small, connection).map_err(|error| error.of(id, name))?;
    let receive_queue = tls::whole_queue(connection);
    let queues = [&receive_queue[..], &connection.send_queue[..]];
    let cuts = [tag::RECEIVE_QUEUE, tag::SEND_QUEUE].map(|tag| {
        let queue = queues[usize::from(tag == tag::SEND_QUEUE)];
        if !queue.is_empty() {
            field::put_header(small, tag, queue.len() as u32);
        }
        small.len()
    });
    if small.len() - record::HEADER > field::LIMIT as usize {
        return Err(Error::invalid("settings of over 1 MiB").of(id, name));
    }
    writer.write_all(before).map_err(|error| Error::io("write", error))?;
    record::seal(writer, small, cuts, queues)
}

fn put_fields(out: &mut Vec<u8>, connection: &Connection) -> Result<()> {
    let Connection { local, remote, control, urgent, buffers, path, settings, nonblocking, .. } = connection;
    let u32s = |tag: u16, out: &mut Vec<u8>, values: &[u32]| {
        field::put(out, tag, |out| values.iter().for_each(|v| out.extend_from_slice(&v.to_le_bytes())));
    };
    put_address(out, tag::LOCAL, local);
    put_address(out, tag::REMOTE, remote);
    field::put(out, tag::CONTROL, |out| {
        out.extend_from_slice(&[control.state as u8, control.fin_unsent.into()]);
        let ControlBlock { rcv_nxt, inq_len, write_seq, outq_len, unsq_len, .. } = control;
        for value in [rcv_nxt, inq_len, write_seq, outq_len, unsq_len] {
            out.extend_from_slice(&value.to_le_bytes());
        }
    });
    let Options { mss_clamp, window_scale, sack, timestamps, microseconds, ecn, ecn_seen, syn_data } =
        &control.options;
    let bits = [
        (sack, bit::SACK),
        (ecn, bit::ECN),
        (ecn_seen, bit::ECN_SEEN),
        (syn_data, bit::SYN_DATA),
        (microseconds, bit::MICROSECONDS),
        (nonblocking, bit::NONBLOCKING),
        (&control.reset, bit::RESET),
    ];
    let bits = bits.into_iter().map(|(set, bit)| u16::from(*set) * bit).sum::<u16>();
    field::put(out, tag::OPTIONS, |out| {
        out.extend_from_slice(&mss_clamp.to_le_bytes());
        out.extend_from_slice(&bits.to_le_bytes());
    });
    if let Some(scale) = window_scale {
        field::put(out, tag::WINDOW_SCALE, |out| out.extend_from_slice(&[scale.snd, scale.rcv]));
    }
    if let Some(clock) = timestamps {
        u32s(tag::TIMESTAMPS, out, &[*clock]);
    }
    if let Some(Window { snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup }) = control.window {
        u32s(tag::WINDOW, out, &[snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup]);
    }
    if let Some(Urgent { offset, consumed }) = urgent {
        field::put(out, tag::URGENT, |out| {
            out.extend_from_slice(&offset.to_le_bytes());
            out.push((*consumed).into());
        });
    }
    if let Some(Buffers { send, receive, lock }) = *buffers {
        u32s(tag::BUFFERS, out, &[send, receive, lock]);
    }
    if let Some(path) = path {
        put_path(out, path)?;
    }
    if let Some(Tracked { wire, initiator, mark, .. }) = &connection.tracked {
        field::put(out, tag::TRACKED, |out| {
            write_address(out, &wire.local);
            write_address(out, &wire.remote);
            out.push((*initiator).into());
            out.extend_from_slice(&mark.to_le_bytes());
        });
    }
    if let Some(owner) = connection.owner {
        u32s(tag::OWNER, out, &[owner.user, owner.group]);
    }
    if let Some(tls) = &connection.tls {
        field::put(out, tag::TLS, |out| tls::write(out, tls));
    }
    if settings.iter().count() > SETTINGS_LIMIT {
        return Err(Error::invalid("more than 256 settings"));
    }
    settings.iter().try_for_each(|(name, value)| put_setting(out, name, value))
}

pub(super) fn put_address(out: &mut Vec<u8>, tag: u16, address: &SocketAddr) {
    field::put(out, tag, |out| write_address(out, address));
}

pub(super) fn write_address(out: &mut Vec<u8>, address: &SocketAddr) {
    out.push(if address.is_ipv4() { 4 } else { 6 });
    out.extend_from_slice(&address.port().to_le_bytes());
    match address {
        SocketAddr::V4(address) => out.extend_from_slice(&address.ip().octets()),
        SocketAddr::V6(address) => {
            out.extend_from_slice(&address.ip().octets());
            out.extend_from_slice(&address.flowinfo().to_le_bytes());
            out.extend_from_slice(&address.scope_id().to_le_bytes());
        }
    }
}

fn put_path(out: &mut Vec<u8>, path: &Path) -> Result<()> {
    let Path { rtt, rttvar, rto, snd_mss, snd_cwnd, snd_ssthresh, rcv_ssthresh } = path;
    let mut times = [0; 3];
    for (time, duration) in times.iter_mut().zip([rtt, rttvar, rto]) {
        *time = u64::try_from(duration.as_nanos())
            .map_err(|_| Error::invalid("a round-trip time of centuries"))?;
    }
    field::put(out, tag::PATH, |out| {
        times.iter().for_each(|time| out.extend_from_slice(&time.to_le_bytes()));
        for value in [snd_mss, snd_cwnd, snd_ssthresh, rcv_ssthresh] {
            out.extend_from_slice(&value.to_le_bytes());
        }
    });
    Ok(())
}

fn put_setting(out: &mut Vec<u8>, name: &str, value: &Setting) -> Result<()> {
    let (kind, length) = match value {
        Setting::Number(_) => (NUMBER, 4),
        Setting::Bytes(bytes) => (BYTES, bytes.len()),
        Setting::Secret(bytes) => (SECRET, bytes.len()),
    };
    if !option_name(name) || length > field::LIMIT as usize {
        return Err(Error::invalid("a setting has no kernel name, or is over 1 MiB"));
    }
    field::put(out, tag::SETTING, |out| {
        out.extend_from_slice(&[kind, name.len() as u8]);
        out.extend_from_slice(name.as_bytes());
        match value {
            Setting::Number(number) => out.extend_from_slice(&number.to_le_bytes()),
            Setting::Bytes(bytes) | Setting::Secret(bytes) => out.extend_from_slice(bytes),
        }
    });
    Ok(())
}

/// Whether it can be the name of a socket option. Names are printed on terminals, so other characters are refused.
fn option_name(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// The fields of a connection, as far as they have been read.
#[derive(Default)]
pub(super) struct Fields {
    pub(super) name: String,
    queues: [Vec<u8>; 2],
    seen: u64,
    small: u32,
    count: usize,
    local: Option<SocketAddr>,
    remote: Option<SocketAddr>,
    control: Option<ControlBlock>,
    options: Option<Options>,
    window_scale: Option<WindowScale>,
    timestamps: Option<u32>,
    window: Option<Window>,
    urgent: Option<Urgent>,
    buffers: Option<Buffers>,
    path: Option<Path>,
    settings: soccr::settings::Settings,
    nonblocking: bool,
    tracked: Option<Tracked>,
    owner: Option<Owner>,
    tls: Option<tls::Layer>,
    reset: bool,
}

impl Fields {
    /// None yet; `queues` is the memory of a connection that is no longer needed.
    pub(super) fn new(mut queues: [Vec<u8>; 2]) -> Self {
        queues.iter_mut().for_each(Vec::clear);
        Self { queues, ..Self::default() }
    }

    /// Reads all fields of a record.
    pub(super) fn read<R: Read>(&mut self, payload: &mut Payload<'_, R>) -> Result<()> {
        while let Some((tag, length)) = payload.field()? {
            let number = tag & !CRITICAL;
            if tag != tag::SETTING && number < 64 {
                if self.seen & (1 << number) != 0 {
                    return Err(Error::damaged(format!("field {number} is there twice")));
                }
                self.seen |= 1 << number;
            }
            match tag {
                tag::RECEIVE_QUEUE => payload.queue(length, &mut self.queues[0])?,
                tag::SEND_QUEUE => payload.queue(length, &mut self.queues[1])?,
                _ if !known(tag) => skip_unknown(payload, tag, length)?,
                _ => {
                    // Everything but the queues shares one limit: many small fields take memory as well.
                    self.small = self.small.saturating_add(length).saturating_add(field::HEADER as u32);
                    if self.small > field::LIMIT {
                        return Err(Error::damaged("settings of over 1 MiB"));
                    }
                    self.field(tag, payload.value(length)?)?;
                }
            }
        }
        Ok(())
    }

    fn field(&mut self, tag: u16, mut value: Value<'_>) -> Result<()> {
        let v = &mut value;
        match tag {
            tag::NAME => self.name = text(v.rest(), super::TEXT_LIMIT)?,
            tag::LOCAL => self.local = Some(address(v)?),
            tag::REMOTE => self.remote = Some(address(v)?),
            tag::CONTROL => self.control = Some(control(v)?),
            tag::OPTIONS => {
                let (options, nonblocking, reset) = options(v)?;
                (self.options, self.nonblocking, self.reset) = (Some(options), nonblocking, reset);
            }
            tag::WINDOW_SCALE => self.window_scale = Some(WindowScale { snd: v.u8()?, rcv: v.u8()? }),
            tag::TIMESTAMPS => self.timestamps = Some(v.u32()?),
            tag::WINDOW => {
                self.window = Some(Window {
                    snd_wl1: v.u32()?,
                    snd_wnd: v.u32()?,
                    max_window: v.u32()?,
                    rcv_wnd: v.u32()?,
                    rcv_wup: v.u32()?,
                });
            }
            tag::URGENT => self.urgent = Some(Urgent { offset: v.u32()?, consumed: v.flag()? }),
            tag::BUFFERS => {
                self.buffers = Some(Buffers { send: v.u32()?, receive: v.u32()?, lock: v.u32()? });
            }
            tag::PATH => {
                self.path = Some(Path {
                    rtt: Duration::from_nanos(v.u64()?),
                    rttvar: Duration::from_nanos(v.u64()?),
                    rto: Duration::from_nanos(v.u64()?),
                    snd_mss: v.u32()?,
                    snd_cwnd: v.u32()?,
                    snd_ssthresh: v.u32()?,
                    rcv_ssthresh: v.u32()?,
                });
            }
            tag::TRACKED => {
                let wire = Flow { local: address(v)?, remote: address(v)? };
                self.tracked = Some(Tracked { wire, initiator: v.flag()?, mark: v.u32()? });
            }
            tag::TLS => self.tls = Some(tls::read(v)?),
            tag::OWNER => self.owner = Some(Owner { user: v.u32()?, group: v.u32()? }),
            _ => self.setting(v)?,
        }
        value.end()
    }

    fn setting(&mut self, value: &mut Value<'_>) -> Result<()> {
        self.count += 1;
        if self.count > SETTINGS_LIMIT {
            return Err(Error::damaged("more than 256 settings"));
        }
        let (kind, length) = (value.u8()?, value.u8()?);
        let name = std::str::from_utf8(value.bytes(length.into())?)
            .ok()
            .filter(|name| option_name(name))
            .ok_or_else(|| Error::damaged("a setting has no kernel name"))?;
        let value = match kind {
            NUMBER => Setting::Number(i32::from_le_bytes(value.array()?)),
            BYTES => Setting::Bytes(value.rest().to_vec()),
            SECRET => Setting::Secret(value.rest().to_vec()),
            _ => return Err(Error::newer(format_args!("a setting of kind {kind}"))),
        };
        self.settings.set(name, value);
        Ok(())
    }

    /// Puts the fields together.
    pub(super) fn connection(self) -> Result<Connection> {
        let missing = |what: &'static str| move || Error::damaged(format!("{what} is missing"));
        let [mut receive_queue, send_queue] = self.queues;
        let tls = self.tls.map(|layer| layer.with_records(&mut receive_queue)).transpose()?;
        Ok(Connection {
            local: self.local.ok_or_else(missing("the local address"))?,
            remote: self.remote.ok_or_else(missing("the remote address"))?,
            control: ControlBlock {
                options: Options {
                    window_scale: self.window_scale,
                    timestamps: self.timestamps,
                    ..self.options.ok_or_else(missing("the options field"))?
                },
                window: self.window,
                reset: self.reset,
                ..self.control.ok_or_else(missing("the control block"))?
            },
            receive_queue,
            send_queue,
            urgent: self.urgent,
            buffers: self.buffers,
            path: self.path,
            settings: self.settings,
            nonblocking: self.nonblocking,
            tracked: self.tracked,
            owner: self.owner,
            tls,
        })
    }
}

#[rustfmt::skip]
fn known(tag: u16) -> bool {
    matches!(
        tag,
        tag::NAME | tag::LOCAL | tag::REMOTE | tag::CONTROL | tag::OPTIONS | tag::WINDOW_SCALE | tag::TIMESTAMPS
            | tag::WINDOW | tag::URGENT | tag::BUFFERS | tag::PATH | tag::SETTING | tag::TRACKED | tag::OWNER
            | tag::TLS
    )
}

/// Steps over a field of a newer version, or refuses to.
pub(super) fn skip_unknown<R: Read>(payload: &mut Payload<'_, R>, tag: u16, length: u32) -> Result<()> {
    if tag & CRITICAL != 0 {
        return Err(Error::newer(format_args!("it needs field {}", tag & !CRITICAL)));
    }
    payload.skip(length)
}

/// Text that people will see on their terminals: short, and without control characters.
pub(super) fn text(bytes: &[u8], limit: usize) -> Result<String> {
    let text = std::str::from_utf8(bytes).ok().filter(|text| text.len() <= limit);
    match text {
        Some(text) if !text.chars().any(char::is_control) => Ok(text.to_owned()),
        _ => Err(Error::damaged("a text is no text, or too long")),
    }
}

pub(super) fn address(value: &mut Value<'_>) -> Result<SocketAddr> {
    let (family, port) = (value.u8()?, value.u16()?);
    match family {
        4 => Ok((IpAddr::from(value.array::<4>()?), port).into()),
        6 => {
            let ip = Ipv6Addr::from(value.array::<16>()?);
            Ok(SocketAddrV6::new(ip, port, value.u32()?, value.u32()?).into())
        }
        _ => Err(Error::newer(format_args!("an address of family {family}"))),
    }
}

fn control(value: &mut Value<'_>) -> Result<ControlBlock> {
    let state = value.u8()?;
    Ok(ControlBlock {
        state: State::from_kernel(state).ok_or_else(|| Error::damaged(format!("state {state}")))?,
        fin_unsent: value.flag()?,
        reset: false,
        rcv_nxt: value.u32()?,
        inq_len: value.u32()?,
        write_seq: value.u32()?,
        outq_len: value.u32()?,
        unsq_len: value.u32()?,
        options: Options::default(),
        window: None,
    })
}

/// The options, `O_NONBLOCK`, and whether the connection was reset.
fn options(value: &mut Value<'_>) -> Result<(Options, bool, bool)> {
    let (mss_clamp, bits) = (value.u16()?, value.u16()?);
    if bits & !bit::ALL != 0 {
        return Err(Error::newer(format_args!("option bits {bits:#x}")));
    }
    let options = Options {
        mss_clamp,
        sack: bits & bit::SACK != 0,
        ecn: bits & bit::ECN != 0,
        ecn_seen: bits & bit::ECN_SEEN != 0,
        syn_data: bits & bit::SYN_DATA != 0,
        microseconds: bits & bit::MICROSECONDS != 0,
        ..Options::default()
    };
    Ok((options, bits & bit::NONBLOCKING != 0, bits & bit::RESET != 0))
}

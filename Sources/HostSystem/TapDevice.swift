import CLinux
import Glibc

/// Why a tap interface cannot be used. Each text names the remedy.
public enum TapError: Error, Sendable, CustomStringConvertible {
  /// The name is empty or longer than the kernel's 15 bytes.
  case badName(String)
  /// No interface of this name exists in this network namespace.
  case missing(String)
  /// Another program holds the tap.
  case busy(String)
  /// The tap belongs to somebody else and the caller lacks `CAP_NET_ADMIN`.
  case notPermitted(String)
  /// The interface exists but is no tap (a tun, a bridge, a card).
  case wrongKind(String)
  /// `/dev/net/tun` cannot be opened.
  case noDriver(SystemError)
  /// A descriptor handed over is no tap.
  case notATap(descriptor: Int32)
  /// A tap handed over lacks the virtio header (`IFF_VNET_HDR`) or carries packet information.
  case wrongFlags(name: String, flags: UInt32)
  case system(SystemError)

  public var description: String {
    switch self {
    case .badName(let name): "Tap name \"\(name)\" does not fit; use 1 to 15 bytes"
    case .missing(let name): "Tap \(name) does not exist; create it with: ip tuntap add dev \(name) mode tap"
    case .busy(let name): "Tap \(name) is in use by another program; end that program or choose another tap"
    case .notPermitted(let name):
      "Tap \(name) may not be opened; create it for this user with: ip tuntap add dev \(name) mode tap user NAME"
    case .wrongKind(let name):
      "Interface \(name) is not a tap; create one with: ip tuntap add dev NAME mode tap"
    case .noDriver(let error): "\(error); load the module with: modprobe tun"
    case .notATap(let descriptor): "Descriptor \(descriptor) is not a tap; pass one attached with TUNSETIFF"
    case .wrongFlags(let name, let flags):
      "Tap \(name) has flags 0x\(String(flags, radix: 16)); attach it with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"
    case .system(let error): error.description
    }
  }
}

/// One queue of a tap interface: a read takes one frame, a write gives one, each behind a 12-byte virtio header in
/// little-endian order (`linux/if_tun.h`). Non-blocking.
public struct TapDevice: ~Copyable, Sendable {
  public let fd: OwnedFD
  public let name: String

  /// Bytes before every frame, `struct virtio_net_hdr_v1`.
  public static var headerByteCount: Int { 12 }

  /// What the tap may leave to the reader of its frames (`TUN_F_*`).
  public struct Offloads: OptionSet, Sendable {
    public let rawValue: UInt32
    public init(rawValue: UInt32) { self.rawValue = rawValue }
    public static let checksum = Offloads(rawValue: 0x01)
    public static let tso4 = Offloads(rawValue: 0x02)
    public static let tso6 = Offloads(rawValue: 0x04)
    public static let ecn = Offloads(rawValue: 0x08)
  }

  /// Attaches to an existing interface. It stays as it is when the owner ends.
  public static func open(_ name: String) throws(TapError) -> TapDevice {
    guard (1...15).contains(name.utf8.count) else { throw .badName(name) }
    // TUNSETIFF would create a missing interface for a privileged caller, and a misspelt name would go unnoticed.
    guard unsafe if_nametoindex(name) != 0 else { throw .missing(name) }
    let driver: OwnedFD
    do { driver = try OwnedFD.open("/dev/net/tun", O_RDWR | O_NONBLOCK) } catch { throw .noDriver(error) }
    let flags = UInt32(clinux_tun_tap | clinux_tun_no_packet_info | clinux_tun_vnet_header)
    // SAFETY: the name is a NUL-terminated copy that lives for the call.
    var result = unsafe clinux_tun_attach(driver.rawValue, name, flags)
    // A tap made for several queues wants to be asked so.
    if result == -EINVAL { result = unsafe clinux_tun_attach(driver.rawValue, name, flags | UInt32(clinux_tun_multi_queue)) }
    switch result {
    case 0...: break
    case -EBUSY: throw .busy(name)
    case -EPERM, -EACCES: throw .notPermitted(name)
    case -EINVAL, -EEXIST: throw .wrongKind(name)
    default: throw .system(SystemError("attach to tap \(name)", Errno(-result)))
    }
    // It may have gone between our look and the attachment, and the kernel then made a new one, which goes with `driver`.
    guard let state = Self.interface(of: driver), state.flags & Self.persistent != 0 else { throw .missing(name) }
    return try TapDevice(attached: driver, name: name)
  }

  /// IFF_PERSIST: the interface outlives the descriptors attached to it.
  private static var persistent: UInt32 { 0x0800 }

  /// What `fd` is attached to, nil if to nothing.
  private static func interface(of fd: borrowing OwnedFD) -> (name: String, flags: UInt32)? {
    var bytes = [CChar](repeating: 0, count: 16)
    var flags: UInt32 = 0
    let number = fd.rawValue
    // SAFETY: 16 bytes for the name, as the call demands; both live for the call.
    let result = unsafe bytes.withUnsafeMutableBufferPointer { name in
      unsafe clinux_tun_interface(number, name.baseAddress, &flags)
    }
    guard result >= 0 else { return nil }
    return (String(decoding: bytes.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self), flags)
  }

  /// Adopts a descriptor that was attached by somebody else (launch contract), checking that it is a tap with the header.
  public init(adopting fd: consuming OwnedFD) throws(TapError) {
    guard let (name, flags) = Self.interface(of: fd) else { throw .notATap(descriptor: fd.rawValue) }
    let wanted = UInt32(clinux_tun_tap | clinux_tun_no_packet_info | clinux_tun_vnet_header)
    let iffTun: UInt32 = 0x0001
    guard flags & (wanted | iffTun) == wanted else { throw .wrongFlags(name: name, flags: flags) }
    do { try fd.setNonBlocking(true) } catch { throw .system(error) }
    try self.init(attached: fd, name: name)
  }

  private init(attached fd: consuming OwnedFD, name: String) throws(TapError) {
    do {
      _ = try checked(
        clinux_tun_set_header_size(fd.rawValue, CInt(Self.headerByteCount)), "set the header size of tap \(name)")
      _ = try checked(clinux_tun_set_little_endian(fd.rawValue), "set the byte order of tap \(name)")
      // Whatever the last user left: nobody has negotiated anything yet.
      _ = try checked(clinux_tun_set_offload(fd.rawValue, 0), "set the offloads of tap \(name)")
    } catch { throw .system(error) }
    self.fd = fd
    self.name = name
  }

  /// Ends the pairing of descriptor and name; the descriptor is the caller's.
  public consuming func takeFD() -> OwnedFD { fd }

  /// Lets the kernel hand over frames without checksum, or larger than the MTU, exactly as far as `offloads` says.
  public borrowing func setOffloads(_ offloads: Offloads) throws(SystemError) {
    _ = try checked(clinux_tun_set_offload(fd.rawValue, offloads.rawValue), "set the offloads of tap \(name)")
  }
}

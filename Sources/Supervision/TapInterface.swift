import CLinux
import Glibc
import HostSystem

/// Attaches to an existing tap interface (`linux/if_tun.h`); never makes one.
enum TapInterface {
  private static let setInterface: UInt = 0x4004_54CA  // TUNSETIFF
  private static let getInterface: UInt = 0x8004_54D2  // TUNGETIFF
  private static let setHeaderSize: UInt = 0x4004_54D8  // TUNSETVNETHDRSZ
  private static let setLittleEndian: UInt = 0x4004_54DC  // TUNSETVNETLE
  private static let setOffload: UInt = 0x4004_54D0  // TUNSETOFFLOAD
  private static let getIndex: UInt = 0x8933  // SIOCGIFINDEX

  private static let isTap: Int16 = 0x0002  // IFF_TAP
  private static let noPacketInformation: Int16 = 0x1000  // IFF_NO_PI
  private static let virtioHeader: Int16 = 0x4000  // IFF_VNET_HDR
  private static let multipleQueues: Int16 = 0x0100  // IFF_MULTI_QUEUE
  private static let persistent: Int16 = 0x0800  // IFF_PERSIST

  /// The queue descriptor, non-blocking, with 12-byte little-endian virtio headers and no offloads.
  static func attach(_ tap: String, net: String) throws(SupervisionError) -> OwnedFD {
    guard exists(tap) else { throw .tapMissing(net: net, tap: tap) }
    let fd: OwnedFD
    do { fd = try OwnedFD.open("/dev/net/tun", O_RDWR | O_NONBLOCK) } catch { throw .noTun(net: net, error.errno) }
    let flags = isTap | noPacketInformation | virtioHeader
    var result = request(fd, setInterface, tap, flags)
    // A tap made for several queues wants to be asked so.
    if result == -EINVAL { result = request(fd, setInterface, tap, flags | multipleQueues) }
    switch -result {
    case 0: break
    case EBUSY: throw .tapBusy(net: net, tap: tap)
    case EINVAL: throw .notATap(net: net, tap: tap)
    default: throw .tap(net: net, tap: tap, Errno(-result))
    }
    // It may have gone between our look and the attachment, and the kernel then made a new one, which goes with `fd`.
    var state = InterfaceRequest(name: tap)
    if state.call(fd, getInterface) < 0 || state.flags & persistent == 0 { throw .tapMissing(net: net, tap: tap) }
    var size: CInt = 12
    var one: CInt = 1
    // SAFETY: both are ints of ours, which these calls read.
    let header = unsafe clinux_ioctl_pointer(fd.rawValue, setHeaderSize, &size)
    if header < 0 { throw .tap(net: net, tap: tap, Errno(-header)) }
    _ = unsafe clinux_ioctl_pointer(fd.rawValue, setLittleEndian, &one)
    _ = clinux_ioctl(fd.rawValue, setOffload, 0)
    return fd
  }

  /// By an ioctl on a socket, because /sys may show another network namespace.
  static func exists(_ name: String) -> Bool {
    let number = socket(AF_UNIX, CInt(SOCK_DGRAM.rawValue) | CInt(SOCK_CLOEXEC.rawValue), 0)
    guard number >= 0 else { return false }
    let fd = OwnedFD(owning: number)
    var state = InterfaceRequest(name: name)
    return state.call(fd, getIndex) >= 0
  }

  private static func request(_ fd: borrowing OwnedFD, _ code: UInt, _ name: String, _ flags: Int16) -> CInt {
    var state = InterfaceRequest(name: name)
    state.flags = flags
    return state.call(fd, code)
  }
}

/// `struct ifreq`: 16 bytes of name, then a union of which only the 16-bit flags matter here; 40 bytes in all.
private struct InterfaceRequest {
  private var bytes = [UInt8](repeating: 0, count: 40)

  init(name: String) {
    for (index, byte) in name.utf8.prefix(15).enumerated() { bytes[index] = byte }
  }

  var flags: Int16 {
    get { Int16(bitPattern: UInt16(bytes[16]) | UInt16(bytes[17]) << 8) }
    set {
      bytes[16] = UInt8(truncatingIfNeeded: newValue)
      bytes[17] = UInt8(truncatingIfNeeded: newValue >> 8)
    }
  }

  mutating func call(_ fd: borrowing OwnedFD, _ code: UInt) -> CInt {
    // SAFETY: the buffer has the size of struct ifreq and lives for the call.
    let number = fd.rawValue
    return unsafe bytes.withUnsafeMutableBytes { unsafe clinux_ioctl_pointer(number, code, $0.baseAddress) }
  }
}

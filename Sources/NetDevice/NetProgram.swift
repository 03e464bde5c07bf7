import BackendKit
import HostSystem
import VirtioSpec

/// `martlet-net`.
package enum NetProgram {
  package static var program: BackendProgram {
    BackendProgram(
      type: "net",
      options: [
        .value("tap", "NAME", "attach to this existing tap interface"),
        .value("tap-fd", "NUMBER", "use this inherited tap, attached with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"),
        .value("packet-fd", "NUMBER", "use this inherited SOCK_SEQPACKET socket: 12-byte virtio headers and frames"),
        .value("mac", "ADDRESS", "the card's address, such as 52:54:00:12:34:56 (default: the driver's choice)"),
        .value("mtu", "BYTES", "the greatest packet of the network, 68 to 65535 (default: the driver's choice)"),
      ])
  }

  /// Runs the program; returns its exit code.
  package static func run(_ arguments: [String]) -> CInt {
    program.run(arguments) { launch throws(BackendError) in
      let identity = try identity(launch)
      let port = try port(launch)
      do throws(SystemError) {
        return try NetworkCard.make(ports: [port], identity: identity)
      } catch { throw .system(error) }
    }
  }

  private static func identity(_ launch: LaunchArguments) throws(BackendError) -> NetworkCard.Identity {
    var identity = NetworkCard.Identity()
    if let text = launch.value("mac") {
      guard let mac = MACAddress(text), !mac.isMulticast, mac != MACAddress() else {
        throw .badOption("--mac", why: "needs the address of one card, such as 52:54:00:12:34:56, not \(text)")
      }
      identity.mac = mac
    }
    if let mtu = try launch.number("mtu", in: 68...65535) { identity.mtu = UInt16(mtu) }
    return identity
  }

  private static func port(_ launch: LaunchArguments) throws(BackendError) -> PacketPort {
    let given = ["tap", "tap-fd", "packet-fd"].filter { launch.has($0) }
    guard given.count == 1 else { throw .device("Exactly one of --tap, --tap-fd and --packet-fd is needed") }
    do {
      if let name = launch.value("tap") { return PacketPort(tap: try TapDevice.open(name)) }
      if let number = try launch.descriptor("tap-fd") {
        return PacketPort(tap: try TapDevice(adopting: OwnedFD.inherited(number)))
      }
      if let number = try launch.descriptor("packet-fd") { return try PacketPort.socket(OwnedFD.inherited(number)) }
      throw BackendError.device("No port was given")
    } catch { throw BackendError(error) }
  }
}

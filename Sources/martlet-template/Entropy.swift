import BackendKit
import HostSystem
import VirtioQueue
import VirtioSpec

/// An entropy device (virtio 1.4, section 5.4): one queue whose chains are buffers to be filled with random bytes, no
/// configuration space, no features of its own. The smallest true device, to be copied: docs/backends.md.
struct Entropy: ChainDevice, ~Copyable {
  /// Where random bytes come from.
  let source: OwnedFD

  /// Into one buffer. The driver may offer gigabytes and is content with less: it asks again.
  private static let limit = 4096

  var profile: DeviceProfile { DeviceProfile(device: .entropy) }

  mutating func serve(_ chain: inout DescriptorChain, queue: Int, _ context: inout BackendContext) -> ChainAnswer {
    switch chain.fill(from: source, atMost: Self.limit) {
    case .bytes: return .done
    case .wouldBlock: context.end(because: "The source of random bytes does not wait for them; name one that blocks")
    case .end: context.end(because: "The source of random bytes has come to its end")
    case .failed(let error): context.end(because: "The source of random bytes cannot be read: \(error)")
    }
    return .later
  }
}

extension Entropy {
  static let program = BackendProgram(
    name: "martlet-template", type: "rng", summary: "a virtio entropy device in its own process",
    options: [
      .value("source", "PATH", "where random bytes come from (default: /dev/urandom)"),
      .value("source-fd", "NUMBER", "the same as an inherited descriptor"),
    ])

  static func make(_ launch: LaunchArguments) throws(BackendError) -> Entropy {
    let number = try launch.descriptor("source-fd")
    do throws(SystemError) {
      if let number { return Entropy(source: try .inherited(number)) }
      return Entropy(source: try .open(launch.value("source") ?? "/dev/urandom", 0))
    } catch { throw .system(error) }
  }
}

import Foundation
import Machine
import Testing

/// Stock Linux needs a KVM that runs a kernel's instructions: on real hardware, or in `scripts/lab`. The kernel and
/// initramfs come from `scripts/guest-image`; MARTLET_GUEST_IMAGES names its directory.
@Suite("Stock Linux on the machine, serial port only", .serialized)
struct LinuxTests {
  static var images: URL? {
    ProcessInfo.processInfo.environment["MARTLET_GUEST_IMAGES"].map { URL(fileURLWithPath: $0) }
  }

  @Test("Linux boots to its init and powers off", arguments: ["vmlinuz", "vmlinux"], [1, 4])
  func boots(kernel: String, processors: Int) throws {
    guard let images = Self.images else {
      print("skipped: MARTLET_GUEST_IMAGES is not set")
      return
    }
    let outcome = try MicroMachine(
      kernel: images.appendingPathComponent(kernel),
      commandLine: "console=ttyS0 mitigations=off martlet.console=ttyS0 "
        + (ProcessInfo.processInfo.environment["MARTLET_GUEST_ARGUMENTS"] ?? ""),
      processors: processors, memory: 512 << 20,
      initramfs: images.appendingPathComponent(ProcessInfo.processInfo.environment["MARTLET_GUEST_INITRAMFS"] ?? "initramfs"),
      timeout: .seconds(180), echo: true
    ).run()
    #expect(outcome.end == .poweredOff)
    #expect(outcome.warnings == [])
  }
}

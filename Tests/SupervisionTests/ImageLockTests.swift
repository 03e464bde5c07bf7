import Foundation
import Glibc
import HostSystem
import Supervision
import Testing

/// When the supervisor gives up the lock of a process that is gone.
@Suite struct ImageLockTests {
  private func isHad(_ outcome: ImageLock.Outcome) -> Bool {
    if case .had = outcome { true } else { false }
  }

  @Test func onlyWhereNothingGoesPastThePageCache() throws {
    let path = FileManager.default.currentDirectoryPath + "/.image-lock-\(getpid())"
    defer { unlink(path) }
    let file = try OwnedFD.open(path, O_RDWR | O_CREAT)
    let next = try OwnedFD.open(path, O_RDWR)
    // What its process has is the same open file.
    let process = try file.duplicate()
    #expect(isHad(ImageLock.share(process.rawValue)))
    #expect(!isHad(ImageLock.shareAlone(next.rawValue)))
    // O_DIRECT
    if fcntl(process.rawValue, F_SETFL, 0o40000) == 0 {
      ImageLock.giveUp(file.rawValue)
      #expect(!isHad(ImageLock.shareAlone(next.rawValue)), "requests of its own may be under way")
      #expect(fcntl(process.rawValue, F_SETFL, 0) == 0)
    }
    ImageLock.giveUp(file.rawValue)
    #expect(isHad(ImageLock.shareAlone(next.rawValue)))
  }
}

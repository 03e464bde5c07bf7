import CSandbox
import Glibc
import HostSystem
import Sandbox

/// The walls of one jail as the kernel calls take them: everything decided, nothing left to look up.
package final class JailWalls {
  struct Place {
    var kind: Int32
    var rights: Int32
    var path: String
    var size: UInt64
    var idMap: OwnedIDMap?
  }

  /// A user namespace that shows one owner's file as another's.
  final class OwnedIDMap {
    let fd: OwnedFD
    init(_ fd: consuming OwnedFD) { self.fd = fd }
  }

  var places: [Place] = []
  var limits: [(resource: Int32, value: UInt64)] = []
  var environment: [String] = []
  var directory: String?
  var capabilities: UInt64 = 0
  var landlockLevel = 0
  var keepsNetwork = false
  var filter: [SystemCallFilter.Instruction] = []
  var cookie: UInt64 = 0

  init() {}

  /// The path of a place, for the report of a step that failed there.
  package func placeName(_ index: Int) -> String? { places.indices.contains(index) ? places[index].path : nil }

  /// The disks below what it may read and write, programs aside; none where a file system has no disk of its own.
  func disks() -> [StorageDevice] {
    var found: [StorageDevice] = []
    let kinds = [CSANDBOX_PLACE_FILE, CSANDBOX_PLACE_DIRECTORY, CSANDBOX_PLACE_DEVICE].map { Int32($0.rawValue) }
    for place in places where kinds.contains(place.kind) && place.rights & Int32(CSANDBOX_PLACE_EXECUTABLE.rawValue) == 0 {
      guard let status = try? OwnedFD.open(place.path, pathOnly).status(), let disk = StorageDevice(status) else { continue }
      if !found.contains(disk) { found.append(disk) }
    }
    return found
  }

  /// Lends `body` the C structure, which is valid for the call only.
  func withStructure<Result>(_ body: (UnsafePointer<csandbox_jail>) -> Result) -> Result {
    let paths = CStrings(places.map(\.path) + [directory ?? "/"])
    let variables = CStrings(environment)
    let entries = unsafe places.indices.map { index in
      unsafe csandbox_place(
        kind: places[index].kind, rights: places[index].rights, path: paths[index],
        id_map: places[index].idMap?.fd.rawValue ?? -1, size: places[index].size)
    }
    let resources = limits.map { csandbox_limit(resource: $0.resource, value: $0.value) }
    // SAFETY: all arrays and strings live until the end of this function, which is after the call of `body`; the filter has
    // the layout of struct sock_filter (SandboxTests).
    return withExtendedLifetime((paths, variables, self)) {
      unsafe entries.withUnsafeBufferPointer { entries in
        unsafe resources.withUnsafeBufferPointer { resources in
          unsafe filter.withUnsafeBytes { program in
            var jail = unsafe csandbox_jail(
              places: entries.baseAddress, place_count: Int32(entries.count), limits: resources.baseAddress,
              limit_count: Int32(resources.count), environment: variables.pointers, directory: paths[places.count],
              capabilities: capabilities, landlock_level: Int32(landlockLevel), keeps_network: keepsNetwork ? 1 : 0,
              filter: filter.isEmpty ? nil : program.baseAddress, filter_length: UInt16(filter.count), cookie: cookie)
            return unsafe body(&jail)
          }
        }
      }
    }
  }
}

/// NUL-terminated copies of strings, with an array of pointers to them that ends in nil.
@safe
final class CStrings {
  let pointers: UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>
  private let storage: UnsafeMutablePointer<CChar>
  private let count: Int

  init(_ strings: [String]) {
    count = strings.count
    let size = strings.reduce(1) { $0 + $1.utf8.count + 1 }
    unsafe storage = .allocate(capacity: size)
    unsafe pointers = .allocate(capacity: strings.count + 1)
    var offset = 0
    for (index, string) in strings.enumerated() {
      // SAFETY: `size` counts every byte and terminator; `pointers` has a slot for each string and the nil.
      unsafe (pointers + index).initialize(to: storage + offset)
      for byte in string.utf8CString {
        unsafe (storage + offset).initialize(to: byte)
        offset += 1
      }
    }
    unsafe (pointers + strings.count).initialize(to: nil)
  }

  deinit {
    unsafe pointers.deallocate()
    unsafe storage.deallocate()
  }

  subscript(index: Int) -> UnsafePointer<CChar>? {
    precondition(index < count, "A string of the table")
    // SAFETY: checked above.
    return unsafe UnsafePointer(pointers[index])
  }
}
